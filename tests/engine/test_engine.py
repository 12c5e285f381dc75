"""The laws of the engine, on a real small model in float32."""

from __future__ import annotations

import random
import threading
from collections import deque
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from strobe.attention.problem import Paged
from strobe.engine import runner
from strobe.engine.config import EngineConfig
from strobe.engine.engine import Engine
from strobe.engine.request import Request
from strobe.engine.sampling_params import SamplingParams
from strobe.errors import RequestError, SettingsError, UnknownNameError
from strobe.models.batch import Batch

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
ROOMY = EngineConfig(kv_cache_pages=200, max_num_seqs=32)


class Replayed:
    """In place of CUDA graphs on a CPU: the work of the first step of a size, run again for the others.

    What it gives lies in one tensor, as a graph's does, and holds nothing of sense until it is replayed.
    """

    def record(self, work):
        static = torch.full_like(work(), float("nan"))
        return static, lambda: static.copy_(work())


MODES = {"in turn": {}, "overlapped": {"overlap": True}, "graphs": {"overlap": True, "graphs": True}}


@pytest.fixture(autouse=True, params=MODES)
def mode(request, monkeypatch):
    """Every law holds however the steps are run."""
    monkeypatch.setitem(globals(), "ROOMY", replace(ROOMY, **MODES[request.param]))
    monkeypatch.setattr(runner, "recorder_for", lambda device: Replayed())
    return request.param


def random_prompts(seed: int, count: int, longest: int = 60) -> list[tuple[int, ...]]:
    """Half of them go on from a common beginning."""
    rng = random.Random(seed)
    common = [rng.randrange(256) for _ in range(37)]
    prompts = []
    for index in range(count):
        own = [rng.randrange(256) for _ in range(rng.randint(1, longest))]
        prompts.append(tuple(common + own if index % 2 else own))
    return prompts


def run(
    checkpoint, prompts, params=GREEDY, config=None, *, drip: int | None = None
) -> tuple[list[Request], Engine]:
    """All prompts through a fresh engine; `drip` adds one every so many steps."""
    engine = Engine(checkpoint.model, checkpoint.tokenizer, config or ROOMY)
    every = params if isinstance(params, list) else [params] * len(prompts)
    requests = [Request(str(i), tuple(p), s) for i, (p, s) in enumerate(zip(prompts, every, strict=True))]
    left = list(requests)
    steps = 0
    while left or engine.has_work:
        if drip is None or steps % drip == 0:
            for request in left[: None if drip is None else 1]:
                engine.add(left.pop(0) if request is left[0] else request)
        engine.step()
        engine.scheduler.check()
        steps += 1
    assert engine.scheduler.cache.used == 0
    assert not engine._launched
    return requests, engine


def tokens(requests: list[Request]) -> list[list[tuple[int, ...]]]:
    return [[output.token_ids for output in request.output().outputs] for request in requests]


@pytest.fixture(scope="module")
def prompts():
    return random_prompts(1, 8)


@pytest.fixture(scope="module")
def alone(checkpoint, prompts):
    return [tokens(run(checkpoint, [prompt])[0])[0] for prompt in prompts]


def test_greedy_tokens_are_those_of_transformers(folder, prompts, alone):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for prompt, outputs in zip(prompts, alone, strict=True):
        ids = torch.tensor([prompt])
        wanted = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, eos_token_id=None
        )
        assert list(outputs[0]) == wanted[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    ("config", "drip", "sees"),
    [
        pytest.param({}, None, {}, id="together"),
        pytest.param({}, 3, {"prefix_hits"}, id="joining one by one"),
        pytest.param({"max_num_batched_tokens": 11, "max_num_seqs": 8}, None, {}, id="chunked"),
        pytest.param({"max_num_seqs": 3}, None, {"prefix_hits"}, id="queued"),
        pytest.param({"kv_cache_pages": 12}, None, {"preemptions"}, id="preempted"),
        pytest.param(
            {"kv_cache_pages": 12, "prefix_cache": False}, 2, {"preemptions"}, id="preempted, no prefixes"
        ),
        pytest.param({"page_size": 1, "kv_cache_pages": 2000}, None, {}, id="pages of one token"),
        pytest.param(
            {"page_size": 5, "kv_cache_pages": 40, "max_num_batched_tokens": 32}, 1, {}, id="odd pages"
        ),
        pytest.param({"attention_kernel": "torch_naive"}, None, {}, id="another kernel"),
    ],
)
def test_greedy_tokens_do_not_depend_on_company(checkpoint, prompts, alone, config, drip, sees):
    requests, engine = run(checkpoint, prompts, config=replace(ROOMY, **config), drip=drip)
    assert tokens(requests) == alone
    stats = engine.stats()
    for name in sees:
        assert getattr(stats, name) > 0, f"this case was to see {name}"


def test_seeded_samples_do_not_depend_on_company(checkpoint, prompts):
    params = [
        SamplingParams(
            temperature=0.9, top_p=0.9, top_k=40 + i, seed=i, max_tokens=12, ignore_eos=True, n=1 + i % 2
        )
        for i in range(len(prompts))
    ]
    one_by_one = [
        tokens(run(checkpoint, [prompt], [p])[0])[0] for prompt, p in zip(prompts, params, strict=True)
    ]
    together, _ = run(checkpoint, prompts, params)
    assert tokens(together) == one_by_one
    cramped, engine = run(checkpoint, prompts, params, replace(ROOMY, kv_cache_pages=12))
    assert tokens(cramped) == one_by_one
    assert engine.stats().preemptions > 0
    assert len({tuple(output) for output in one_by_one[1]}) == 2, "n outputs of one seed differ"


def test_requests_without_a_seed_differ_and_engines_repeat(checkpoint, prompts):
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    first, second = (tokens(run(checkpoint, [prompts[0]] * 2, params)[0]) for _ in range(2))
    assert first == second
    assert first[0] != first[1]
    other, _ = run(checkpoint, [prompts[0]] * 2, params, replace(ROOMY, seed=1))
    assert tokens(other) != first


def test_siblings_are_what_they_would_be_alone(checkpoint, prompts):
    params = SamplingParams(temperature=0, n=3, max_tokens=9, ignore_eos=True)
    (request,), engine = run(checkpoint, [prompts[1]], params)
    assert len({output.token_ids for output in request.output().outputs}) == 1, "greedy siblings agree"
    assert engine.stats().prompt_tokens == len(prompts[1]), "the prompt ran once"


def full_logits(checkpoint, ids: list[int]) -> np.ndarray:
    """Every position's logits, by one plain forward pass."""
    engine = Engine(checkpoint.model, None, replace(ROOMY, kv_cache_pages=12))
    count = len(ids)
    pages = torch.arange(-(-count // 16), dtype=torch.int32)[None]
    layout = Paged(page_table=pages, seq_lens=torch.tensor([count], dtype=torch.int32), max_kv_len=count)
    every = torch.arange(count)
    with torch.inference_mode():
        batch = Batch(torch.tensor(ids), every, every, layout, every, engine.runner.kv_cache)
        return checkpoint.model(batch).numpy().astype(np.float64)


def test_logprobs_are_those_of_the_model(checkpoint, prompts):
    params = SamplingParams(temperature=1.3, seed=4, max_tokens=6, logprobs=3, ignore_eos=True)
    bare = replace(params, logprobs=0)
    requests, _ = run(
        checkpoint, [prompts[0], prompts[2], prompts[4]], [params, bare, replace(params, logprobs=None)]
    )
    output = requests[0].output().outputs[0]
    logits = full_logits(checkpoint, [*prompts[0], *output.token_ids])[len(prompts[0]) - 1 : -1]
    wanted = (
        logits
        - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
        - logits.max(1, keepdims=True)
    )
    for position, entry in enumerate(output.logprobs):
        assert entry.token_id == output.token_ids[position]
        np.testing.assert_allclose(entry.logprob, wanted[position, entry.token_id], atol=1e-4)
        assert [token for token, _ in entry.top] == np.argsort(-wanted[position])[:3].tolist()
        np.testing.assert_allclose([p for _, p in entry.top], -np.sort(-wanted[position])[:3], atol=1e-4)
    assert [entry.top for entry in requests[1].output().outputs[0].logprobs] == [()] * 6
    assert requests[2].output().outputs[0].logprobs == ()


def test_penalties_forbid_repeats(checkpoint, prompts):
    plain, _ = run(checkpoint, [prompts[0]], replace(GREEDY, max_tokens=40))
    params = replace(GREEDY, max_tokens=40, presence_penalty=100.0)
    (request,), _ = run(checkpoint, [prompts[0]], params)
    drawn = request.output().token_ids
    assert len(set(drawn)) == len(drawn)
    assert len(set(plain[0].output().token_ids)) < 40


def test_stops(checkpoint, prompts, alone):
    (greedy,) = alone[0]
    third = greedy[2]
    first_at = greedy.index(third)
    (request,), _ = run(checkpoint, [prompts[0]], replace(GREEDY, stop_token_ids=(third,)))
    output = request.output().outputs[0]
    assert output.token_ids == greedy[: first_at + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", third)
    assert output.text == checkpoint.tokenizer.decode(greedy[:first_at])

    (request,), _ = run(
        checkpoint, [prompts[0]], replace(GREEDY, stop_token_ids=(third,), min_tokens=first_at + 2)
    )
    drawn = request.output().token_ids
    assert len(drawn) >= first_at + 2
    assert third not in drawn[: first_at + 1]


def test_the_models_own_end_token_ends_unless_ignored(checkpoint, prompts, alone):
    (greedy,) = alone[0]
    engine_end = greedy[4]
    at = greedy.index(engine_end)
    model = checkpoint.model
    config = model.config
    model.config = replace(config, eos_token_ids=(engine_end,))
    try:
        (ended, ignored), _ = run(checkpoint, [prompts[0]] * 2, [replace(GREEDY, ignore_eos=False), GREEDY])
    finally:
        model.config = config
    assert ended.output().token_ids == greedy[: at + 1]
    assert ended.output().finish_reason == "stop"
    assert ignored.output().token_ids == greedy
    assert ignored.output().finish_reason == "length"


def test_output_ends_with_the_context(checkpoint):
    (request,), _ = run(checkpoint, [range(150)], SamplingParams(temperature=0, ignore_eos=True))
    assert len(request.output().token_ids) == 10
    assert request.output().finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "params", "error", "message"),
    [
        ((), {}, RequestError, "empty"),
        ((0, 260), {}, RequestError, "outside 0 to 259"),
        ((-1,), {}, RequestError, "outside"),
        (range(160), {}, RequestError, "160 tokens; this model's context is 160"),
        ((1,), {"max_tokens": 161}, RequestError, "max_tokens is 161"),
        ((1,), {"n": 33}, RequestError, "n is 33"),
    ],
)
def test_what_cannot_be_served_is_refused_at_once(checkpoint, prompt, params, error, message):
    engine = Engine(checkpoint.model, None, ROOMY)
    with pytest.raises(error, match=message):
        engine.add(Request("x", tuple(prompt), SamplingParams(**params)))
    assert not engine.has_work


def test_a_request_that_never_fits_is_refused_and_others_go_on(checkpoint, prompts):
    config = EngineConfig(kv_cache_pages=4)
    engine = Engine(checkpoint.model, None, config)
    assert engine.max_model_len == 64
    with pytest.raises(RequestError, match="context is 64"):
        engine.add(Request("x", (1,) * 64, SamplingParams(max_tokens=1)))
    requests, _ = run(checkpoint, [(1,) * 30, (2,) * 30, (3,) * 30], config=config)
    assert all(len(request.output().token_ids) == 24 for request in requests)


def test_duplicate_ids_are_refused(checkpoint):
    engine = Engine(checkpoint.model, None, ROOMY)
    engine.add(Request("same", (1, 2), GREEDY))
    with pytest.raises(RequestError, match="'same' is in use"):
        engine.add(Request("same", (1, 2), GREEDY))


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"attention_kernel": "torch_sdp"}, UnknownNameError, "did you mean 'torch_sdpa'"),
        ({"linear_kernel": "nope"}, UnknownNameError, "linear kernel"),
        ({"max_model_len": 161}, SettingsError, "the model's context is 160"),
        ({"max_model_len": 100, "kv_cache_pages": 6}, SettingsError, "hold 96 tokens"),
        ({"kv_cache_gib": 1e6}, SettingsError, "GiB are free"),
        ({"kv_cache_gib": 1e-9}, SettingsError, "kv_cache_gib is 1e-09; a page of this model takes"),
    ],
    ids=str,
)
def test_an_engine_that_cannot_be_is_refused(checkpoint, config, error, message):
    with pytest.raises(error, match=message):
        Engine(checkpoint.model, None, EngineConfig(**config))


def test_abort_frees_pages_and_leaves_the_others_alone(checkpoint, prompts, alone):
    engine = Engine(checkpoint.model, checkpoint.tokenizer, replace(ROOMY, max_num_seqs=4))
    requests = [Request(str(i), prompt, replace(GREEDY, n=1 + (i == 2))) for i, prompt in enumerate(prompts)]
    for request in requests:
        engine.add(request)
    for _ in range(5):
        engine.step()
    for victim in ("1", "2", "7", "unknown"):  # running, forked, waiting, nobody
        engine.abort(victim)
    ended = engine.step()
    assert {(chunk.request_id, chunk.index, chunk.finish_reason) for chunk in ended} == {
        ("1", 0, "abort"),
        ("2", 0, "abort"),
        ("2", 1, "abort"),
        ("7", 0, "abort"),
    }
    engine.scheduler.check()
    while engine.has_work:
        engine.step()
    assert engine.scheduler.cache.used == 0
    for index in (0, 3, 4, 5, 6):
        assert tokens([requests[index]])[0] == alone[index]


def test_requests_arrive_and_leave_from_other_threads(checkpoint):
    engine = Engine(checkpoint.model, None, replace(ROOMY, kv_cache_pages=30, max_num_seqs=8))

    def client(seed: int) -> None:
        rng = random.Random(seed)
        for index in range(20):
            prompt = tuple(rng.randrange(256) for _ in range(rng.randint(1, 50)))
            engine.add(Request(f"{seed}/{index}", prompt, replace(GREEDY, max_tokens=rng.randint(1, 10))))
            if rng.random() < 0.4:
                engine.abort(f"{seed}/{index}")

    clients = [threading.Thread(target=client, args=(seed,)) for seed in range(4)]
    for thread in clients:
        thread.start()
    ended = set()
    while any(thread.is_alive() for thread in clients) or engine.has_work:
        ended |= {chunk.request_id for chunk in engine.step() if chunk.metrics is not None}
    assert len(ended) == 80
    engine.scheduler.check()
    assert engine.scheduler.cache.used == 0


def test_an_abort_that_comes_while_messages_are_taken_is_not_lost(checkpoint, prompts):
    engine = Engine(checkpoint.model, None, ROOMY)

    class Arrived(deque):
        """Another thread adds a request, and drops it, when the engine has just seen that nobody came."""

        def __bool__(self) -> bool:
            if not len(self) and not engine.has_work:
                engine.add(Request("late", prompts[0], GREEDY))
                engine.abort("late")
                return False
            return len(self) > 0

    engine._arrived = Arrived()
    ended = [chunk for _ in range(3) for chunk in engine.step()]
    assert [(chunk.request_id, chunk.finish_reason) for chunk in ended[:1]] == [("late", "abort")]
    engine.scheduler.check()


def test_a_failed_step_loses_no_page(checkpoint, prompts):
    engine = Engine(checkpoint.model, None, ROOMY)
    model_call = engine.runner.run
    engine.runner.run = lambda schedule: 1 / 0
    engine.add(Request("a", prompts[0], GREEDY))
    with pytest.raises(ZeroDivisionError):
        engine.step()
    engine.abort("a")
    engine.runner.run = model_call
    engine.step()
    engine.scheduler.check()
    assert engine.scheduler.cache.used == 0
    assert not engine.has_work


def test_salts_keep_prefixes_apart(checkpoint, prompts):
    engine = Engine(checkpoint.model, None, ROOMY)
    cached = []
    for index, salt in enumerate([b"a", b"b", b"a"]):
        request = Request(str(index), prompts[1], GREEDY, cache_salt=salt)
        engine.add(request)
        while engine.has_work:
            engine.step()
        cached.append(request.output().metrics.cached_tokens)
    assert cached[:2] == [0, 0]
    assert cached[2] == (len(prompts[1]) - 1) // 16 * 16
