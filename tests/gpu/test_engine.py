"""The engine on a GPU: the same tokens however its steps are run, and nothing lost or left behind."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from strobe.engine.config import EngineConfig
from strobe.engine.engine import Engine
from strobe.engine.request import Request
from strobe.engine.sampling_params import SamplingParams
from strobe.models.network import Model
from strobe.models.shapes import named, random_model

pytestmark = pytest.mark.gpu

MODES = {
    "eager": {"overlap": False, "graphs": False},
    "overlap": {"overlap": True, "graphs": False},
    "graphs": {"overlap": True, "graphs": True},
}
CONFIG = EngineConfig(kv_cache_pages=600, max_num_seqs=24, max_num_batched_tokens=256)
TIE = 0.1
"""Log-probabilities closer than this may come out in either order in bfloat16."""


@pytest.fixture(scope="module")
def wide() -> Model:
    """Llama-3.2-1B's sizes, four layers of it, in bfloat16."""
    config = replace(named("llama3.2-1b"), layers=4, max_position=4096)
    return random_model(config, device="cuda", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def tiny() -> Model:
    from strobe.checkpoints.load import load

    return load(None, device="cuda").model


@pytest.fixture(params=["tiny", "wide"])
def model(request) -> Model:
    return request.getfixturevalue(request.param)


def random_requests(rng: random.Random, model: Model, count: int, **params) -> list[Request]:
    vocab = model.config.vocab_size
    common = [rng.randrange(vocab) for _ in range(40)]
    requests = []
    for index in range(count):
        prompt = common[: rng.choice([0, 16, 40])]
        prompt = prompt + [rng.randrange(vocab) for _ in range(rng.choice([1, 5, 30, 200]))]
        chosen = SamplingParams(
            **{"temperature": 0, "max_tokens": rng.randint(1, 40), "ignore_eos": True} | params
        )
        requests.append(Request(str(index), tuple(prompt), chosen))
    return requests


def serve(engine: Engine, requests: list[Request], rng: random.Random) -> None:
    """All of them, some joining while others run."""
    left = list(requests)
    while left or engine.has_work:
        for _ in range(rng.choice([0, 0, 1, 4])):
            if left:
                engine.add(left.pop(0))
        engine.step()
    engine.scheduler.check()
    assert engine.stats().used_pages == 0


def told(requests: list[Request]) -> list[list[tuple]]:
    return [[(o.token_ids, o.logprobs) for o in request.output().outputs] for request in requests]


@pytest.mark.parametrize("seed", range(2))
def test_deterministic_tokens_are_the_same_in_every_mode_and_any_company(model, seed):
    answers = {}
    for name, mode in MODES.items():
        rng = random.Random(seed)
        requests = random_requests(rng, model, 20, logprobs=2)
        rng.seed(name)  # other arrivals each time
        engine = Engine(model, None, replace(CONFIG, deterministic=True, **mode))
        serve(engine, requests, rng)
        if mode["graphs"]:
            assert engine.runner.graphs.captured > 1
        answers[name] = told(requests)
    alone = []
    for request in requests:
        engine = Engine(model, None, replace(CONFIG, deterministic=True))
        again = Request("alone", request.prompt_token_ids, request.params)
        serve(engine, [again], random.Random(0))
        alone += told([again])
    for name in MODES:
        assert answers[name] == alone, name


@pytest.mark.parametrize(("rows", "step_tokens"), [(24, 256), (100, 2048)])
def test_tokens_differ_between_modes_where_they_tie_only(model, rows, step_tokens):
    config = replace(CONFIG, kv_cache_pages=3000, max_num_seqs=rows, max_num_batched_tokens=step_tokens)
    answers = {}
    for name, mode in MODES.items():
        rng = random.Random(5)
        requests = random_requests(rng, model, rows + 6, logprobs=20)
        engine = Engine(model, None, replace(config, **mode))
        for request in requests[: rows // 4 * 3]:
            engine.add(request)
        serve(engine, requests[rows // 4 * 3 :], rng)
        answers[name] = [request.output().outputs[0] for request in requests]
    for name in ("overlap", "graphs"):
        for ours, theirs in zip(answers[name], answers["eager"], strict=True):
            pairs = zip(ours.token_ids, theirs.token_ids, strict=True)
            at = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
            if at is not None:
                scores = dict(theirs.logprobs[at].top)
                assert ours.token_ids[at] in scores
                assert scores[theirs.token_ids[at]] - scores[ours.token_ids[at]] < TIE


@pytest.mark.parametrize("mode", MODES)
def test_a_storm_with_aborts_and_preemptions_loses_nothing(wide, mode):
    rng = random.Random(7)
    engine = Engine(wide, None, replace(CONFIG, kv_cache_pages=60, **MODES[mode]))
    requests = random_requests(rng, wide, 120)
    for request in requests:
        kinds = ({}, {"temperature": 1.0, "top_k": 20}, {"presence_penalty": 1.0}, {"n": 3})
        request.params = replace(request.params, **rng.choice(kinds))
    left, ended = list(requests), set()
    while left or engine.has_work:
        for _ in range(rng.choice([0, 1, 3])):
            if left:
                engine.add(left.pop(0))
        if rng.random() < 0.2:
            engine.abort(str(max(0, len(requests) - len(left) - rng.randint(1, 20))))
        ended |= {chunk.request_id for chunk in engine.step() if chunk.metrics is not None}
        engine.scheduler.check()
    assert len(ended) == len(requests)
    assert engine.stats().used_pages == 0
    assert engine.stats().preemptions > 0
    for request in requests:
        for output in request.output().outputs:
            assert output.finish_reason == "abort" or len(output.token_ids) == request.params.max_tokens
            assert all(0 <= token < wide.config.vocab_size for token in output.token_ids)


@pytest.mark.parametrize("mode", MODES)
def test_memory_stays_as_it_is_over_two_thousand_requests(tiny, mode):
    rng = random.Random(9)
    engine = Engine(tiny, None, replace(CONFIG, **MODES[mode]))

    def more(count: int) -> tuple[int, int]:
        requests = random_requests(rng, tiny, count)
        for request in requests:
            request.params = replace(request.params, max_tokens=rng.randint(1, 6))
        serve(engine, requests, rng)
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    before = [more(250) for _ in range(3)][-1]
    after = [more(250) for _ in range(5)][-1]
    assert after[0] - before[0] < 1 << 20
    assert after[1] - before[1] < 64 << 20


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Any call that waits for the whole stream is an error."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("mode", ["overlap", "graphs"])
def test_no_step_waits_for_the_stream(wide, mode, request):
    engine = Engine(wide, None, replace(CONFIG, **MODES[mode]))
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    requests = [Request(str(i), tuple(range(10 + i, 40 + 3 * i)), params) for i in range(6)]
    for each in requests[:4]:
        engine.add(each)
    for _ in range(6):  # kernels are loaded, graphs of this size recorded
        engine.step()
    request.getfixturevalue("no_waiting")
    for _ in range(30):
        engine.step()
    torch.cuda.set_sync_debug_mode("default")
    while engine.has_work:
        engine.step()
    assert all(len(each.output().token_ids) == 60 for each in requests[:4])


def test_the_cache_takes_the_fraction_asked_for(tiny):
    before, (free, total) = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()
    fraction = (total - free) / total + 0.03
    engine = Engine(
        tiny,
        None,
        EngineConfig(
            gpu_memory_fraction=fraction, max_num_seqs=4096, page_size=16, max_num_batched_tokens=4096
        ),
    )
    plan = engine.memory
    cache = plan.pages * plan.page_bytes
    left = torch.cuda.mem_get_info()[0]
    assert torch.cuda.memory_allocated() - before >= cache
    assert total - left <= fraction * total + (1 << 28)
