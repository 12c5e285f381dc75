"""Outputs kept to a grammar, biased logits, and the prompt's own log-probabilities."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch

from strobe.engine.config import EngineConfig
from strobe.engine.engine import Engine
from strobe.engine.request import Request
from strobe.engine.sampling_params import SamplingParams
from strobe.errors import RequestError


class Listed:
    """A grammar of fixed length: at step i one of `steps[i]`."""

    def __init__(self, *steps: Mapping[int, object] | set[int], broken_after: int | None = None) -> None:
        self.steps = [set(step) for step in steps]
        self.broken_after = broken_after

    def matcher(self) -> ListedMatcher:
        return ListedMatcher(self)


class ListedMatcher:
    def __init__(self, grammar: Listed) -> None:
        self.grammar = grammar
        self.seen: list[int] = []

    @property
    def finished(self) -> bool:
        return len(self.seen) == len(self.grammar.steps)

    @property
    def failed(self) -> bool:
        return self.grammar.broken_after is not None and len(self.seen) > self.grammar.broken_after

    def allowed(self) -> np.ndarray:
        mask = np.zeros(200, dtype=bool)  # shorter than the vocabulary
        mask[list(self.grammar.steps[len(self.seen)])] = True
        return mask

    def accept(self, token_id: int) -> None:
        assert token_id in self.grammar.steps[len(self.seen)]
        self.seen.append(token_id)


def engine_of(checkpoint, **options) -> Engine:
    config = EngineConfig(max_num_seqs=8, page_size=4, **options)
    return Engine(checkpoint.model, checkpoint.tokenizer, config)


def run(engine: Engine, *requests: Request) -> None:
    for request in requests:
        engine.add(request)
    for _ in range(500):
        if not engine.has_work:
            break
        engine.step()
    engine.scheduler.check()
    assert engine.stats().used_pages == 0


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_an_output_keeps_to_its_grammar_and_ends_with_it(checkpoint, temperature):
    steps = [{7, 8}, {9}, {100, 101, 102}, {3}]
    engine = engine_of(checkpoint)
    params = SamplingParams(temperature=temperature, grammar=Listed(*steps), n=3, seed=5)
    free = Request("free", (1, 2, 3), SamplingParams(temperature=0, max_tokens=9, ignore_eos=True))
    bound = Request("bound", (1, 2, 3), params)
    run(engine, bound, free)
    for output in bound.output().outputs:
        assert len(output.token_ids) == 4
        assert all(token in step for token, step in zip(output.token_ids, steps, strict=True))
        assert output.finish_reason == "stop"
        assert output.text == checkpoint.tokenizer.decode(output.token_ids)
    alone = Request("alone", (1, 2, 3), free.params)
    run(engine_of(checkpoint), alone)
    assert free.output().token_ids == alone.output().token_ids


def test_a_grammar_survives_preemption(checkpoint):
    steps = [{20 + i, 60 + i} for i in range(30)]
    requests = [
        Request(str(i), tuple(range(10 + i, 20 + i)), SamplingParams(grammar=Listed(*steps), seed=i))
        for i in range(6)
    ]
    engine = engine_of(checkpoint, kv_cache_pages=24, max_model_len=90)
    run(engine, *requests)
    assert engine.stats().preemptions > 0
    for request in requests:
        assert len(request.output().token_ids) == 30


def test_a_grammar_that_fails_ends_its_own_sequence_alone(checkpoint):
    broken = Request("b", (1, 2), SamplingParams(grammar=Listed(*[{5}] * 9, broken_after=3)))
    other = Request("o", (1, 2), SamplingParams(max_tokens=12, ignore_eos=True))
    run(engine_of(checkpoint), broken, other)
    assert broken.output().finish_reason == "abort"
    assert len(other.output().token_ids) == 12


def test_min_tokens_and_a_grammar_contradict():
    with pytest.raises(RequestError, match="min_tokens"):
        SamplingParams(min_tokens=2, grammar=Listed({1}))


def test_a_bias_decides_between_tokens(checkpoint):
    wanted = Request("w", (1, 2, 3), SamplingParams(temperature=0, max_tokens=4, logit_bias={77: 100.0}))
    run(engine_of(checkpoint), wanted)
    assert wanted.output().token_ids == (77, 77, 77, 77)
    first = wanted.params.logit_bias
    assert SamplingParams(logit_bias=first) == SamplingParams(logit_bias={77: 100.0})
    with pytest.raises(RequestError, match="logit_bias"):
        engine_of(checkpoint).check(Request("x", (1,), SamplingParams(logit_bias={260: 1.0})))
    with pytest.raises(RequestError, match="logit_bias of token 3"):
        SamplingParams(logit_bias={3: float("nan")})


@pytest.mark.parametrize("budget", [8, 13, 2048])
def test_prompt_logprobs_are_those_of_the_model(checkpoint, folder, budget):
    from transformers import AutoModelForCausalLM

    prompt = torch.randint(0, 250, (41,), generator=torch.Generator().manual_seed(budget))
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder).float()(prompt[None]).logits[0]
    wanted = torch.log_softmax(logits, -1)
    engine = engine_of(checkpoint, max_num_batched_tokens=budget)
    warm = Request("warm", tuple(prompt.tolist()), SamplingParams(max_tokens=1))
    scored = Request("s", tuple(prompt.tolist()), SamplingParams(max_tokens=3, prompt_logprobs=2, n=2))
    plain = Request("p", tuple(prompt.tolist()), SamplingParams(max_tokens=3))
    run(engine, warm)  # its pages are cached, and must not be taken for scores
    run(engine, scored, plain)
    assert len(scored.prompt_logprobs) == 40
    assert plain.prompt_logprobs == []
    for index, entry in enumerate(scored.prompt_logprobs):
        assert entry.token_id == prompt[index + 1]
        assert entry.logprob == pytest.approx(wanted[index, entry.token_id].item(), abs=2e-3)
        values, ids = wanted[index].topk(2)
        assert [token for token, _ in entry.top] == ids.tolist()
        assert [value for _, value in entry.top] == pytest.approx(values.tolist(), abs=2e-3)


def test_a_failed_step_drops_those_in_it_and_keeps_those_that_wait(checkpoint, monkeypatch):
    engine = engine_of(checkpoint, max_num_batched_tokens=8)
    first = Request("first", tuple(range(20)), SamplingParams(max_tokens=5, n=2))
    late = Request("late", tuple(range(30)), SamplingParams(max_tokens=5, ignore_eos=True))
    engine.add(first)
    engine.add(late)
    with monkeypatch.context() as patched:
        patched.setattr(engine.runner, "run", lambda schedule: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    assert engine.drop_running() == ["first"]
    engine.scheduler.check()
    while engine.has_work:
        engine.step()
    assert len(late.output().token_ids) == 5
    assert engine.stats().used_pages == 0
