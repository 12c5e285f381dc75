"""Both ways to draw give the same tokens, step after step, while sequences come, wait and go.

The CUDA way runs in the emulator. Logits are random anew at every step, so that a wrong position, count, mask
or table shows in the tokens.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cuda_emulator import emulated_gpu, missing

from strobe.engine import EngineConfig
from strobe.engine.draw_cuda import CudaDraw
from strobe.engine.draw_torch import TorchDraw
from strobe.engine.engine import Engine
from strobe.engine.request import Request, Sequence
from strobe.engine.sampler import Sampler
from strobe.engine.sampling_params import SamplingParams
from strobe.errors import SettingsError

VOCAB = 130
STOPS = (3, 7, 400)


class Odd:
    """A grammar of odd tokens above the last one's half; it is its own matcher."""

    finished = failed = False
    last = 0

    def matcher(self) -> Odd:
        return self

    def allowed(self) -> np.ndarray:
        tokens = np.arange(VOCAB - 5)
        return (tokens % 2 == 1) & (tokens > self.last // 2)

    def accept(self, token_id: int) -> None:
        assert self.allowed()[token_id]
        self.last = token_id


PARAMS = {
    "greedy": {"temperature": 0},
    "plain": {"temperature": 0.9},
    "filtered": {"temperature": 1.3, "top_k": 20, "top_p": 0.8, "min_p": 0.02},
    "penalised": {"repetition_penalty": 1.4, "presence_penalty": 0.5, "frequency_penalty": -0.3},
    "penalised greedy": {"temperature": 0, "frequency_penalty": 2.0},
    "at least": {"temperature": 0, "min_tokens": 4, "stop_token_ids": [5, 9]},
    "biased": {"logit_bias": {1: 5.0, 2: -100.0, 129: 4.0}, "top_k": 5},
    "bound": {"top_p": 0.7},
}


def sequence(name: str, index: int) -> Sequence:
    grammar = {"grammar": Odd()} if name == "bound" else {}
    params = SamplingParams(**PARAMS[name], **grammar, seed=index)
    prompt = tuple(np.random.default_rng(index).integers(0, VOCAB, 9).tolist())
    request = Request(str(index), prompt, params)
    return Sequence(request, 0, 1000 + index, list(prompt), matcher=grammar.get("grammar"))


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_both_ways_draw_the_same_tokens() -> None:
    rng = np.random.default_rng()
    sequences = [sequence(name, index) for index, name in enumerate(PARAMS)]
    torch_way, cuda_way = TorchDraw(STOPS), None
    batch = [0, 1]
    for step in range(14):
        if step % 3 == 0:  # others join, wait or come back
            batch = rng.permutation(len(sequences))[: rng.integers(1, len(sequences) + 1)].tolist()
        drawing = [sequences[row] for row in batch]
        logits = 3 * torch.randn(len(drawing), VOCAB)
        logits[:, list(STOPS[:2])] += 6.0
        expected = torch_way.draw(logits, drawing).on_device.tolist()
        with emulated_gpu(sm_count=4):
            cuda_way = cuda_way or CudaDraw(STOPS, VOCAB, torch.device("cuda"), 16)
            for each in drawing:
                known = each.params.penalised and not each.output
                assert cuda_way.waits_for([each]) == (each.matcher is not None or known)
            out = torch.full((16,), -1)
            tokens = cuda_way.draw(logits, drawing, out)
            assert tokens.on_device.tolist() == tokens.on_host.tolist() == expected
            assert out.tolist() == expected + [-1] * (16 - len(expected))
        for each, token in zip(drawing, expected, strict=True):
            each.tokens.append(token)
            if each.matcher is not None:
                each.matcher.accept(token)


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_counts_that_missed_a_token_are_taken_anew() -> None:
    one, torch_way = sequence("penalised", 3), TorchDraw(())
    with emulated_gpu(sm_count=4):
        cuda_way = CudaDraw((), VOCAB, torch.device("cuda"), 1)
        for _ in range(3):
            logits = torch.randn(1, VOCAB)
            expected = torch_way.draw(logits, [one]).on_device.tolist()
            assert cuda_way.waits_for([one])
            assert cuda_way.draw(logits, [one]).on_device.tolist() == expected
            one.tokens += [*expected, 17]  # one that the kernel did not draw


def test_a_row_that_is_over_does_not_ask_its_matcher() -> None:
    over = sequence("bound", 1)
    over.finish_reason = "stop"
    over.matcher.last = 10**6  # nothing would be allowed
    assert TorchDraw(()).draw(torch.randn(1, VOCAB), [over]).on_device.item() < VOCAB
    if missing() is None:
        with emulated_gpu(sm_count=4):
            way = CudaDraw((), VOCAB, torch.device("cuda"), 1)
            assert way.draw(torch.randn(1, VOCAB), [over]).on_device.item() < VOCAB


class Emulated:
    """CudaDraw as an engine on a CPU calls it."""

    def __init__(self, model) -> None:
        with emulated_gpu(sm_count=4):
            device = torch.device("cuda")
            self._way = CudaDraw(model.config.eos_token_ids, model.config.vocab_size, device, 8)

    def __getattr__(self, name: str):
        def call(*args):
            with emulated_gpu(sm_count=4):
                return getattr(self._way, name)(*args)

        return call


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_an_engine_writes_the_same_by_both_ways(checkpoint) -> None:
    """Also where a step is launched before the tokens of the one ahead are read, and pages run out."""
    room = {"page_size": 4, "kv_cache_pages": 20, "max_num_seqs": 8, "max_model_len": 40}
    wants = [
        {"logprobs": 3, "temperature": 0.8},
        {"temperature": 0, "prompt_logprobs": 2},
        {"n": 2, "frequency_penalty": 0.7, "repetition_penalty": 1.2},
        {"min_tokens": 6, "logprobs": 0, "logit_bias": {257: 20.0}, "top_p": 0.9},
        {"presence_penalty": -0.4, "top_k": 12},
    ]
    texts = []
    for cuda in (False, True):
        config = EngineConfig(overlap=cuda, max_num_batched_tokens=48, **room)
        engine = Engine(checkpoint.model, checkpoint.tokenizer, config)
        if cuda:
            engine.sampler = Sampler(Emulated(checkpoint.model))
        requests = [
            Request(
                str(i), tuple(range(10 + i, 20 + 2 * i)), SamplingParams(seed=i, max_tokens=5 + i, **want)
            )
            for i, want in enumerate(wants)
        ]
        for request in requests:
            engine.add(request)
        while engine.has_work:
            engine.step()
        texts.append([request.output() for request in requests])
    assert engine.scheduler.preemptions
    for ours, theirs in zip(*texts, strict=True):
        for one, other in zip(ours.outputs, theirs.outputs, strict=True):
            assert one.token_ids == other.token_ids
            for a, b in zip(one.logprobs, other.logprobs, strict=True):
                assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
                assert [token for token, _ in a.top] == [token for token, _ in b.top]


@pytest.mark.parametrize("kernel", ["cuda", "fast"])
def test_a_kernel_that_does_not_fit_is_refused(checkpoint, kernel: str) -> None:
    with pytest.raises(SettingsError, match="sampling_kernel"):
        Engine(checkpoint.model, checkpoint.tokenizer, EngineConfig(sampling_kernel=kernel))
