"""A step read late changes nothing but when it is read."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from strobe.engine.config import EngineConfig
from strobe.engine.engine import Engine
from strobe.engine.request import Request
from strobe.engine.sampler import Sampled
from strobe.engine.sampling_params import SamplingParams

IN_TURN = EngineConfig(kv_cache_pages=20, page_size=4, max_num_seqs=6, max_num_batched_tokens=24)
OVERLAPPED = replace(IN_TURN, overlap=True)


class Alternating:
    """A grammar: tokens of two halves of the vocabulary in turn, `count` of them."""

    def __init__(self, count: int) -> None:
        self.count = count

    def matcher(self) -> Walk:
        return Walk(self.count)


class Walk:
    failed = False

    def __init__(self, count: int) -> None:
        self.left = count

    @property
    def finished(self) -> bool:
        return self.left == 0

    def allowed(self) -> np.ndarray:
        assert self.left, "asked what comes after the end"
        mask = np.zeros(256, dtype=bool)
        mask[self.left % 2 :: 2] = True
        return mask

    def accept(self, token_id: int) -> None:
        assert token_id % 2 == self.left % 2
        self.left -= 1


def random_request(rng: random.Random, name: str) -> Request:
    common = [7] * 13
    prompt = common[: rng.choice([0, 9, 13])] + [rng.randrange(256) for _ in range(rng.randint(1, 20))]
    chance = rng.random
    grammar = Alternating(rng.randint(1, 9)) if chance() < 0.2 else None
    params = SamplingParams(
        max_tokens=rng.randint(1, 14),
        temperature=0 if chance() < 0.4 else 1.0,
        top_k=rng.choice([0, 5]),
        seed=rng.randrange(1000),
        n=rng.choice([1, 1, 1, 3]),
        presence_penalty=1.5 if chance() < 0.2 else 0.0,
        stop_token_ids=tuple(rng.randrange(256) for _ in range(rng.choice([0, 12, 24]))),
        stop=(chr(rng.randint(97, 122)), "e") if chance() < 0.3 else (),
        min_tokens=rng.randint(0, 1) if grammar is None else 0,
        logprobs=2 if chance() < 0.3 else None,
        prompt_logprobs=1 if chance() < 0.2 else None,
        grammar=grammar,
    )
    return Request(name, tuple(prompt), params, stream=chance() < 0.5)


def serve(checkpoint, config: EngineConfig, seed: int, count: int = 40, aborts: float = 0.0):
    """Random requests that arrive while others run; outputs by request, and chunks as they came."""
    rng = random.Random(seed)
    requests = [random_request(rng, str(index)) for index in range(count)]
    engine = Engine(checkpoint.model, checkpoint.tokenizer, config)
    chunks: dict[tuple[str, int], list] = {}
    left = requests[:]
    while left or engine.has_work:
        for _ in range(rng.choice([0, 0, 1, 2])):
            if left:
                engine.add(left.pop(0))
        if rng.random() < aborts:
            engine.abort(str(max(0, count - len(left) - rng.randint(1, 6))))
        for chunk in engine.step():
            chunks.setdefault((chunk.request_id, chunk.index), []).append(chunk)
        engine.scheduler.check()
    assert engine.scheduler.cache.used == 0
    return requests, chunks, engine


def drain(engine: Engine) -> None:
    while engine.has_work:
        engine.step()


def told(request: Request):
    return [
        (o.token_ids, o.text, o.logprobs, o.finish_reason, o.stop_reason) for o in request.output().outputs
    ] + [request.prompt_logprobs]


def nearly(ours, theirs) -> bool:
    """Equal, log-probabilities within rounding."""
    if isinstance(ours, float):
        return ours == pytest.approx(theirs, abs=1e-4)
    if isinstance(ours, (list, tuple)):
        return len(ours) == len(theirs) and all(map(nearly, ours, theirs))
    if hasattr(ours, "logprob"):
        both = ((x.token_id, x.logprob, [p for _, p in x.top]) for x in (ours, theirs))
        return nearly(*both)
    return ours == theirs


@pytest.mark.parametrize("seed", range(4))
def test_a_storm_gives_what_it_gives_in_turn(checkpoint, seed):
    requests, _, _ = serve(checkpoint, IN_TURN, seed)
    late, chunks, engine = serve(checkpoint, OVERLAPPED, seed)
    for ours, theirs in zip(late, requests, strict=True):
        assert nearly(told(ours), told(theirs)), ours.params
    for request in late:
        for output in request.output().outputs:
            parts = chunks[request.request_id, output.index]
            assert tuple(t for chunk in parts for t in chunk.token_ids) == output.token_ids
            assert tuple(p for chunk in parts for p in chunk.logprobs) == output.logprobs
            assert parts[-1].finish_reason == output.finish_reason
    assert engine.stats().preemptions > 0
    assert engine.stats().prefix_hits > 0


@pytest.mark.parametrize("seed", range(3))
def test_aborts_at_any_time_leave_the_others_alone(checkpoint, seed):
    requests, _, _ = serve(checkpoint, IN_TURN, seed)
    late, _, _ = serve(checkpoint, OVERLAPPED, seed, aborts=0.3)
    ended = {"abort": 0, "whole": 0}
    for ours, theirs in zip(late, requests, strict=True):
        aborted = any(output.finish_reason == "abort" for output in ours.output().outputs)
        ended["abort" if aborted else "whole"] += 1
        for mine, whole in zip(ours.sequences, theirs.sequences, strict=True):
            assert mine.output == whole.output[: len(mine.output)]
            assert aborted or len(mine.output) == len(whole.output)
    assert min(ended.values()) > 0


def test_the_next_step_is_launched_before_the_last_is_read(checkpoint, monkeypatch):
    log: list[str] = []
    engine = Engine(checkpoint.model, None, OVERLAPPED)
    run, read = engine.runner.run, Sampled.read
    monkeypatch.setattr(engine.runner, "run", lambda schedule: (log.append("run"), run(schedule))[1])
    monkeypatch.setattr(Sampled, "read", lambda sampled: (log.append("read"), read(sampled))[1])
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    engine.add(Request("plain", (1, 2, 3), params))
    drain(engine)
    assert log == ["run", "run", "read", "run", "read", "run", "read", "read"]
    log.clear()
    engine.add(Request("bound", (1, 2, 3), replace(params, grammar=Alternating(4))))
    drain(engine)
    assert log[:6] == ["run", "run", "read", "run", "read", "run"], "a grammar's draw waits, its run does not"


def test_an_unforeseen_end_costs_one_step_and_no_token(checkpoint):
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    engine = Engine(checkpoint.model, None, IN_TURN)
    whole = Request("whole", (5, 6, 7, 8), params)
    engine.add(whole)
    drain(engine)
    end = whole.output().token_ids[5]
    at = whole.output().token_ids.index(end)
    engine = Engine(checkpoint.model, None, OVERLAPPED)
    ended = Request("ended", (5, 6, 7, 8), replace(params, stop_token_ids=(end,)))
    engine.add(ended)
    told = []
    while engine.has_work:
        told += engine.step()
    assert ended.output().token_ids == whole.output().token_ids[: at + 1]
    assert engine.stats().output_tokens == at + 1
    assert len(told) == 1
    assert engine.step() == []
    engine.scheduler.check()
    # what its pages hold is found again, and is right
    again = Request("again", (5, 6, 7, 8, *ended.output().token_ids), replace(params, max_tokens=11 - at))
    engine.add(again)
    drain(engine)
    assert again.output().metrics.cached_tokens > 0
    assert again.output().token_ids == whole.output().token_ids[at + 1 :]


@pytest.mark.parametrize("fails", ["run", "sample", "read"])
def test_a_failed_step_loses_those_in_it_and_no_other(checkpoint, monkeypatch, fails):
    config = replace(OVERLAPPED, max_num_seqs=2)
    engine = Engine(checkpoint.model, None, config)
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    requests = [Request(str(index), (index, 1, 2, 3, 4), params) for index in range(4)]
    for request in requests:
        engine.add(request)
    for _ in range(4):
        engine.step()
    target = {"run": engine.runner, "sample": engine.sampler, "read": Sampled}[fails]
    with monkeypatch.context() as patched:
        patched.setattr(target, fails, lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    assert engine.drop_running() == ["0", "1"]
    engine.scheduler.check()
    chunks = []
    while engine.has_work:
        chunks += engine.step()
    assert {chunk.request_id for chunk in chunks} == {"2", "3"}
    assert engine.scheduler.cache.used == 0
    for request in requests[2:]:
        alone = Request("alone", request.prompt_token_ids, params)
        engine.add(alone)
        drain(engine)
        assert alone.output().token_ids == request.output().token_ids


def test_a_preempted_sequence_that_waits_survives_a_failed_step(checkpoint, monkeypatch):
    config = replace(OVERLAPPED, kv_cache_pages=12, max_num_seqs=4)
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    prompts = [(index, *range(10)) for index in range(4)]
    engine = Engine(checkpoint.model, None, config)
    requests = [Request(str(index), prompt, params) for index, prompt in enumerate(prompts)]
    for request in requests:
        engine.add(request)
    run = engine.runner.run

    def fail_after_preemption(schedule):
        unread = any(sequence.unread for sequence in engine.scheduler.waiting)
        return 1 / 0 if unread else run(schedule)

    monkeypatch.setattr(engine.runner, "run", fail_after_preemption)
    with pytest.raises(ZeroDivisionError):
        drain(engine)
    monkeypatch.setattr(engine.runner, "run", run)
    dropped = engine.drop_running()
    drain(engine)
    engine.scheduler.check()
    kept = [request for request in requests if request.request_id not in dropped]
    assert kept
    for request in kept:
        alone = Engine(checkpoint.model, None, replace(IN_TURN, kv_cache_pages=12))
        same = Request("same", request.prompt_token_ids, params)
        alone.add(same)
        drain(alone)
        assert request.output().token_ids == same.output().token_ids


def test_a_sequence_of_a_step_half_written_back_is_lost_though_it_waits(checkpoint, monkeypatch):
    """Its token is written, and whether it ends there is not: it must not go on from it."""
    engine = Engine(checkpoint.model, None, replace(OVERLAPPED, kv_cache_pages=12, max_num_seqs=4))
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    requests = [Request(str(index), (index, *range(10)), params) for index in range(4)]
    for request in requests:
        engine.add(request)
    accept, stop, waited = engine.scheduler.accept, engine._stop, []

    def note(schedule, tokens):
        waited[:] = [s.request.request_id for s in schedule.sampled if s in engine.scheduler.waiting]
        accept(schedule, tokens)

    monkeypatch.setattr(engine.scheduler, "accept", note)
    monkeypatch.setattr(engine, "_stop", lambda *row: 1 / 0 if waited else stop(*row))
    with pytest.raises(ZeroDivisionError):
        drain(engine)
    monkeypatch.undo()
    assert set(waited) <= set(engine.drop_running())
    drain(engine)
    engine.scheduler.check()
    assert engine.scheduler.cache.used == 0


def test_pages_that_were_written_late_are_found_again(checkpoint):
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    found = []
    for config in (IN_TURN, OVERLAPPED):
        engine = Engine(checkpoint.model, None, config)
        first = Request("first", (9, 8, 7), params)
        engine.add(first)
        drain(engine)
        second = Request("second", (9, 8, 7, *first.output().token_ids), replace(params, max_tokens=2))
        engine.add(second)
        drain(engine)
        found.append(second.output().metrics.cached_tokens)
    assert found == [24, 24]
