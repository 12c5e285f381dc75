"""The next token of every scheduled sequence, from the logits of one forward pass."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Protocol

import torch

from strobe.engine.draw_cuda import CudaDraw
from strobe.engine.draw_torch import TorchDraw
from strobe.engine.request import Sequence, TokenLogprobs
from strobe.engine.scheduler import Chunk, Schedule
from strobe.engine.transfer import Readback, Tokens
from strobe.errors import SettingsError
from strobe.models.network import Model
from strobe.ops import sampling_cuda

KERNELS = ("auto", "torch", "cuda")
_SCORED_ROWS = 256
"""Prompt tokens that are scored at once: a row of log-probabilities has the size of the vocabulary."""

Scores = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Log-probabilities: of the chosen `[rows]`, of the likeliest `[rows, top]`, and their token ids."""


class Draw(Protocol):
    """How tokens are drawn: TorchDraw, CudaDraw."""

    def waits_for(self, sequences: SequenceOf[Sequence]) -> bool: ...

    def draw(
        self, logits: torch.Tensor, sequences: SequenceOf[Sequence], out: torch.Tensor | None = None
    ) -> Tokens: ...

    def logprobs(
        self, logits: torch.Tensor, tokens: torch.Tensor, top: int, rows: list[int] | None = None
    ) -> Scores: ...


def draw_for(kernel: str, model: Model, rows: int) -> Draw:
    """How up to `rows` tokens at once are drawn by the kernel of that name; "auto" is cuda where that fits.

    Raises:
        SettingsError: there is no such kernel, or it does not take this model's logits.
    """
    stop_ids, vocab, device = model.config.eos_token_ids, model.config.vocab_size, model.device
    if kernel not in KERNELS:
        raise SettingsError(f"sampling_kernel is {kernel!r}; supported: {', '.join(KERNELS)}")
    if kernel == "torch":
        return TorchDraw(stop_ids)
    refused = sampling_cuda.refusals(vocab, model.dtype, device)
    if not refused:
        return CudaDraw(stop_ids, vocab, device, rows)
    if kernel == "auto":
        return TorchDraw(stop_ids)
    raise SettingsError(f"sampling_kernel 'cuda' does not fit: {'; '.join(refused)}")


@dataclass(frozen=True)
class Drawn:
    """What a step drew, on the host. `logprobs` are by row, of those rows that want them."""

    token_ids: list[int]
    logprobs: dict[int, TokenLogprobs]
    prompt_logprobs: tuple[tuple[Chunk, list[TokenLogprobs]], ...]


class Sampled:
    """Drawn tokens and what belongs to them, on their way to the host.

    `wanting` are the rows that want log-probabilities, each with the number of likeliest tokens that it
    asks for; `logprobs` are theirs. `scored` are prompt tokens of a chunk, and their log-probabilities,
    which go on from what the chunk's request has.
    """

    def __init__(
        self,
        tokens: Tokens,
        wanting: SequenceOf[tuple[int, int]] = (),
        logprobs: SequenceOf[torch.Tensor] = (),
        scored: SequenceOf[tuple[Chunk, tuple[int, ...], Scores]] = (),
    ) -> None:
        self._wanting = wanting
        self._readback = Readback(tokens.on_device.device)
        token_ids = self._readback.copy(tokens.on_device) if tokens.on_host is None else tokens.on_host
        self._copies = [token_ids, *map(self._readback.copy, logprobs)]
        self._scored = [
            (chunk, tokens, [self._readback.copy(tensor) for tensor in scores])
            for chunk, tokens, scores in scored
        ]
        self._readback.sent()

    def read(self) -> Drawn:
        """Waits for the draw, and for nothing that was launched after it."""
        self._readback.wait()
        tokens, *logprobs = (copy.tolist() for copy in self._copies)
        found = {}
        for (row, top), chosen, values, ids in zip(self._wanting, *logprobs, strict=True):
            found[row] = _token_logprobs(tokens[row], chosen, values[:top], ids[:top])
        scored = tuple(
            (chunk, list(map(_token_logprobs, targets, *(copy.tolist() for copy in scores))))
            for chunk, targets, scores in self._scored
        )
        return Drawn(tokens, found, scored)


def _token_logprobs(token: int, logprob: float, values: list[float], ids: list[int]) -> TokenLogprobs:
    return TokenLogprobs(token, logprob, tuple(zip(ids, values, strict=True)))


class Sampler:
    """Draws by `draw` what a step's logits give."""

    def __init__(self, draw: Draw) -> None:
        self._draw = draw

    def waits_for(self, sequences: SequenceOf[Sequence]) -> bool:
        """True where a draw depends on the tokens before it in ways that the host works out, so that the
        step before must be read first."""
        return self._draw.waits_for(sequences)

    def sample(self, logits: torch.Tensor, schedule: Schedule, out: torch.Tensor | None = None) -> Sampled:
        """A token for each of `schedule.sampled`, from `logits` as `Runner.run` lays them out; they may be
        of any floating type. The tokens are in the first rows of `out` too, int64 on the device, where it is
        given. Launches, and does not wait."""
        count = len(schedule.sampled)
        sequences, rows = schedule.sampled, logits[:count]
        tokens = self._draw.draw(rows, sequences, out)
        scored = self._score_prompts(logits[count:], schedule) if schedule.scored else ()
        wanting = [
            (row, s.params.logprobs) for row, s in enumerate(sequences) if s.params.logprobs is not None
        ]
        if not wanting:
            return Sampled(tokens, scored=scored)
        top = min(max(top for _, top in wanting), rows.shape[1])
        logprobs = self._draw.logprobs(rows, tokens.on_device, top, [row for row, _ in wanting])
        return Sampled(tokens, wanting, logprobs, scored)

    def _score_prompts(
        self, logits: torch.Tensor, schedule: Schedule
    ) -> list[tuple[Chunk, tuple[int, ...], Scores]]:
        """For each chunk of `schedule.scored` those prompt tokens that it gives log-probabilities of, and
        that have none yet; `logits` has a row for each of its tokens."""
        scored, row = [], 0
        for index in schedule.scored:
            chunk = schedule.chunks[index]
            request = chunk.sequence.request
            known, prompt = len(request.prompt_logprobs), request.prompt_token_ids
            top = min(request.params.prompt_logprobs or 0, logits.shape[1])
            first, end = max(chunk.start, known), min(chunk.end, len(prompt) - 1)
            for start in range(first, end, _SCORED_ROWS):
                stop = min(start + _SCORED_ROWS, end)
                targets = prompt[start + 1 : stop + 1]
                rows = logits[row + start - chunk.start : row + stop - chunk.start]
                scores = self._draw.logprobs(rows, torch.tensor(targets, device=logits.device), top)
                scored.append((chunk, targets, scores))
            row += chunk.end - chunk.start
        return scored
