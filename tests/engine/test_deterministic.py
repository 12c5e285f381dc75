"""The same bits whatever else is served."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from strobe.checkpoints.load import load
from strobe.cpu import jit
from strobe.engine.config import EngineConfig
from strobe.engine.deterministic import decode_kernels
from strobe.engine.engine import Engine
from strobe.engine.request import Request
from strobe.engine.sampling_params import SamplingParams
from strobe.errors import OutOfPagesError, SettingsError
from strobe.linear import Projection
from strobe.linear.projection import empty_weight

needs_numba = pytest.mark.skipif(bool(jit.refusals()), reason="numba is not installed")
CONFIG = EngineConfig(
    deterministic=True, kv_cache_pages=80, page_size=4, max_num_seqs=12, max_num_batched_tokens=24
)


def random_request(rng: random.Random, name: str) -> Request:
    prompt = [5] * rng.choice([0, 0, 17]) + [rng.randrange(256) for _ in range(rng.randint(1, 60))]
    params = SamplingParams(
        temperature=0, max_tokens=rng.randint(1, 20), ignore_eos=True, logprobs=3, n=rng.choice([1, 1, 1, 3])
    )
    return Request(name, tuple(prompt), params)


def told(request: Request) -> list[tuple]:
    """Tokens and log-probabilities, to the bit."""
    return [(output.token_ids, output.logprobs) for output in request.output().outputs]


def alone(model, request: Request) -> list[tuple]:
    engine = Engine(model, None, CONFIG)
    again = Request("alone", request.prompt_token_ids, request.params)
    engine.add(again)
    while engine.has_work:
        engine.step()
    return told(again)


@pytest.fixture(params=["wide", pytest.param("narrow", marks=needs_numba)])
def model(request):
    """Weights that bfloat16 does not hold, and those that it does, which other kernels multiply by."""
    return request.getfixturevalue("checkpoint").model if request.param == "wide" else load(None).model


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_a_request_has_the_bits_that_it_has_alone(model, seed, overlap):
    rng = random.Random(seed)
    engine = Engine(model, None, replace(CONFIG, overlap=overlap))
    requests = [random_request(rng, str(index)) for index in range(16)]
    left = requests[:]
    largest = 0
    while left or engine.has_work:
        for _ in range(rng.choice([0, 0, 1, 3])):
            if left:
                engine.add(left.pop(0))
        engine.step()
        engine.scheduler.check()
        largest = max(largest, len(engine.scheduler.running))
    assert largest > 4, "they ran beside others"
    assert engine.stats().preemptions == 0
    assert engine.stats().used_pages == 0
    for request in requests:
        assert told(request) == alone(model, request)


@needs_numba
def test_kernels_are_those_whose_sums_hang_on_their_row_alone(checkpoint):
    assert decode_kernels(load(None).model) == ("decode/numba_paged", "numba_tiled")
    assert decode_kernels(checkpoint.model) == ("decode/numba_paged", "batch_invariant")
    assert decode_kernels(load(None, dtype="bfloat16").model) == ("prefill/torch_naive", "batch_invariant")


def test_without_it_bits_do_hang_on_company(checkpoint):
    """Else the test above would show nothing."""
    rng = random.Random(0)
    requests = [random_request(rng, str(index)) for index in range(16)]
    engine = Engine(checkpoint.model, None, replace(CONFIG, deterministic=False))
    for request in requests:
        engine.add(request)
    while engine.has_work:
        engine.step()
    assert any(told(request) != alone(checkpoint.model, request) for request in requests)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), [(48, 96), (80, 48), (256, 1000), (333, 77)])
def test_a_tokens_product_has_the_same_bits_in_any_batch(inputs, outputs, biased):
    bias = torch.randn(outputs) if biased else None
    projection = Projection(torch.randn(outputs, inputs), bias=bias)
    x = torch.randn(37, inputs)
    whole = projection(x, kernel="batch_invariant")
    for rows in (torch.randperm(37)[:count] for count in (1, 2, 7, 8, 9, 30, 37)):
        assert torch.equal(projection(x[rows], kernel="batch_invariant"), whole[rows])
    oracle = x.double() @ projection.weight.double().t() + (0 if bias is None else bias)
    torch.testing.assert_close(whole, oracle.float(), rtol=1e-4, atol=1e-4)


@needs_numba
@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), [(48, 96), (333, 78), (256, 1000)])
def test_a_tokens_tiled_product_has_the_same_bits_in_any_batch(inputs, outputs, swiglu):
    weight = empty_weight(outputs, inputs, device="cpu", dtype=torch.float32)
    weight.copy_(torch.randn(outputs, inputs).bfloat16())
    around = {"bias": torch.randn(outputs), "norm": torch.rand(inputs), "norm_eps": 1e-5, "swiglu": swiglu}
    projection = Projection(weight, **around)
    x = torch.randn(37, inputs)
    residual = torch.randn(37, outputs // 2 if swiglu else outputs)
    whole = projection(x, residual.clone(), kernel="numba_tiled")
    for rows in (torch.randperm(37)[:count] for count in (1, 2, 3, 7, 8, 15, 16, 33, 37)):
        assert torch.equal(projection(x[rows], residual[rows], kernel="numba_tiled"), whole[rows])


def test_a_request_waits_until_it_can_stay(checkpoint):
    engine = Engine(checkpoint.model, None, replace(CONFIG, kv_cache_pages=20))
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    requests = [Request(str(index), (index,) * 10, params) for index in range(5)]
    for request in requests:
        engine.add(request)
    while engine.has_work:
        engine.step()
        assert len(engine.scheduler.running) <= 2, "each may come to hold 10 of 20 pages"
    assert engine.stats().preemptions == 0
    assert all(len(request.output().token_ids) == 30 for request in requests)


def test_siblings_that_can_never_stay_together_are_refused(checkpoint):
    engine = Engine(checkpoint.model, None, replace(CONFIG, kv_cache_pages=20, max_model_len=60))
    params = SamplingParams(temperature=0, max_tokens=30, n=3)
    with pytest.raises(OutOfPagesError, match="may need 26 KV-cache pages; there are 20"):
        engine.add(Request("x", (1,) * 10, params))


def test_a_kernel_by_name_is_refused():
    with pytest.raises(SettingsError, match="deterministic and a kernel by name"):
        EngineConfig(deterministic=True, attention_kernel="torch_naive")
