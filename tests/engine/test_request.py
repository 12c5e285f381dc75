"""What SamplingParams and EngineConfig take and refuse."""

from __future__ import annotations

import math

import pytest

from strobe.engine.config import EngineConfig
from strobe.engine.sampling_params import SamplingParams
from strobe.errors import RequestError, SettingsError

BAD_PARAMS = [
    *(
        (name, value)
        for name in ("temperature", "top_p", "min_p")
        for value in (math.nan, -0.1, math.inf, "1", True)
    ),
    *((name, math.nan) for name in ("repetition_penalty", "presence_penalty", "frequency_penalty")),
    ("temperature", 1e9),
    ("top_p", 0.0),
    ("top_p", 1.01),
    ("min_p", 1.5),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", -1.0),
    ("top_k", -2),
    ("top_k", 2.0),
    ("max_tokens", 0),
    ("max_tokens", -5),
    ("max_tokens", 10**12),
    ("max_tokens", 1.5),
    ("min_tokens", -1),
    ("n", 0),
    ("n", 10**6),
    ("seed", "7"),
    ("seed", 1 << 70),
    ("logprobs", -1),
    ("logprobs", 1000),
    ("stop", [""]),
    ("stop", [3]),
    ("stop", ["x"] * 1000),
    ("stop", ["x" * 10**5]),
    ("stop", {"a": 1}),
    ("stop_token_ids", ["a"]),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", [True]),
    ("ignore_eos", 1),
    ("logit_bias", 5),
    ("logit_bias", [1]),
    ("logit_bias", {"a": 1.0}),
    ("logit_bias", {1: math.nan}),
    ("grammar", "root ::= x"),
]


@pytest.mark.parametrize(
    ("name", "value"), BAD_PARAMS, ids=[f"{name}={value!r:.20}" for name, value in BAD_PARAMS]
)
def test_bad_sampling_params_are_refused_by_name(name, value):
    with pytest.raises(RequestError, match=name):
        SamplingParams(**{name: value})


def test_contradiction_is_refused():
    with pytest.raises(RequestError, match="min_tokens 5 is over max_tokens 4"):
        SamplingParams(min_tokens=5, max_tokens=4)


@pytest.mark.parametrize(("temperature", "greedy"), [(0, True), (5e-324, True), (9e-6, True), (1e-5, False)])
def test_a_temperature_that_is_nearly_none_is_none(temperature, greedy):
    """5e-324 is zero in float32, in which logits are divided by it."""
    params = SamplingParams(temperature=temperature)
    assert (params.greedy, params.temperature == 0) == (greedy, greedy)


def test_params_are_values():
    params = SamplingParams(stop="\n\n", stop_token_ids=[3, 4])
    assert params.stop == ("\n\n",)
    assert params.stop_token_ids == (3, 4)
    assert params == SamplingParams(stop=["\n\n"], stop_token_ids=(3, 4))
    assert hash(params) == hash(SamplingParams(stop=["\n\n"], stop_token_ids=(3, 4)))
    with pytest.raises(AttributeError):
        params.temperature = 0.5
    biased = [SamplingParams(logit_bias=bias) for bias in ({3: 1.5}, [(3, 1.5)], ([3, 1.5],))]
    assert len(set(biased)) == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"page_size": 0}, "page_size"),
        ({"page_size": 3.0}, "page_size"),
        ({"kv_cache_pages": -1}, "kv_cache_pages"),
        ({"kv_cache_gib": math.nan}, "kv_cache_gib"),
        ({"kv_cache_gib": True}, "kv_cache_gib"),
        ({"kv_cache_gib": 1, "kv_cache_pages": 3}, "both given"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"max_num_seqs": 64, "max_num_batched_tokens": 63}, "max_num_batched_tokens"),
        ({"max_model_len": 1}, "max_model_len"),
        ({"seed": -1}, "seed"),
        ({"prefix_cache": "no"}, "prefix_cache"),
        ({"attention_kernel": 3}, "attention_kernel"),
    ],
    ids=str,
)
def test_bad_engine_config_is_refused_by_name(values, message):
    with pytest.raises(SettingsError, match=message):
        EngineConfig(**values)
