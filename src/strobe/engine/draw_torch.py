"""The draw of a batch by PyTorch's operations, on any device."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import replace

import numpy as np
import torch

from strobe.engine.request import Sequence
from strobe.engine.sampling_params import SamplingParams
from strobe.engine.transfer import Tokens
from strobe.ops import sampling


class _Rows:
    """What stays as it is while the same sequences draw: numbers by row, and who needs what.

    Lists of rows have their twins `..._at` on the device: indexing by a list waits for it.
    """

    def __init__(self, sequences: tuple[Sequence, ...], vocab: int, device: torch.device) -> None:
        params = [sequence.params for sequence in sequences]
        self.sequences = sequences
        self.plain = all(p.plain for p in params)
        if self.plain:
            return  # nothing else is looked at
        self.bound = [row for row, sequence in enumerate(sequences) if sequence.matcher is not None]
        self.penalised = [sequence for sequence in sequences if sequence.params.penalised]
        self.penalised_at = _column([row for row, p in enumerate(params) if p.penalised], device, torch.int64)
        self.penalties = _penalties(self.penalised, vocab, device)
        self.at_least = [row for row, p in enumerate(params) if p.min_tokens > 0]
        self.biases = _biases(params, device)
        self.random = [row for row, p in enumerate(params) if not p.greedy]
        self.random_at = _column(self.random, device, torch.int64)
        drawing = [params[row] for row in self.random]
        self.seeds = np.array([sequences[row].seed for row in self.random], dtype=np.uint64)
        self.temperature = _column([p.temperature for p in drawing], device)
        self.filters = _filters(drawing, vocab, device)


class TorchDraw:
    """`stop_ids` are the model's own end tokens, which `min_tokens` forbids."""

    def __init__(self, stop_ids: SequenceOf[int]) -> None:
        self._stop_ids = tuple(stop_ids)
        self._rows: _Rows | None = None

    def waits_for(self, sequences: SequenceOf[Sequence]) -> bool:
        """True where the host must know the tokens before: penalties count them, a grammar goes on from
        them."""
        return any(sequence.matcher is not None or sequence.params.penalised for sequence in sequences)

    def draw(
        self, logits: torch.Tensor, sequences: SequenceOf[Sequence], out: torch.Tensor | None = None
    ) -> Tokens:
        """A token id for each sequence from its row of `logits` `[rows, vocab]`, in `out` where given."""
        token_ids = self._token_ids(logits, sequences)
        return Tokens(token_ids if out is None else out[: len(token_ids)].copy_(token_ids))

    def _token_ids(self, logits: torch.Tensor, sequences: SequenceOf[Sequence]) -> torch.Tensor:
        sequences, vocab = tuple(sequences), logits.shape[1]
        rows = self._rows
        if rows is None or rows.sequences != sequences:
            rows = self._rows = _Rows(sequences, vocab, logits.device)
        if rows.plain:
            return sampling.likeliest(logits)
        logits = self._edited(logits, rows)
        if len(rows.random) == len(sequences):
            return self._draw_random(logits, rows)
        token_ids = sampling.likeliest(logits)
        if rows.random:
            token_ids[rows.random_at] = self._draw_random(logits[rows.random_at], rows)
        return token_ids

    def logprobs(
        self, logits: torch.Tensor, tokens: torch.Tensor, top: int, rows: list[int] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As `sampling.logprobs`, of some rows of both or of all."""
        if rows is not None and len(rows) < len(tokens):
            at = _column(rows, logits.device, torch.int64)
            logits, tokens = logits[at], tokens[at]
        return sampling.logprobs(logits, tokens, top)

    def _edited(self, logits: torch.Tensor, rows: _Rows) -> torch.Tensor:
        """The logits with penalties, biases and what may not come taken in."""
        vocab, sequences = logits.shape[1], rows.sequences
        forbidden = [
            (row, token)
            for row in rows.at_least
            if sequences[row].params.min_tokens > sequences[row].output_len
            for token in (*self._stop_ids, *sequences[row].params.stop_token_ids)
            if token < vocab
        ]
        bound = [row for row in rows.bound if sequences[row].finish_reason is None]
        if not (forbidden or rows.penalties or rows.biases or bound):
            return logits
        logits = logits.to(torch.float32, copy=True)
        if rows.penalties:
            output = _counts([sequence.output for sequence in rows.penalised], vocab, logits.device)
            penalties = replace(rows.penalties, output=output)
            logits[rows.penalised_at] = sampling.penalise(logits[rows.penalised_at], penalties)
        if forbidden:
            at, tokens = (_column(each, logits.device, torch.int64) for each in zip(*forbidden, strict=True))
            logits[at, tokens] = -torch.inf
        if rows.biases:
            at, tokens, biases = rows.biases
            logits[at, tokens] += biases
        if bound:
            at = _column(bound, logits.device, torch.int64)
            allowed = _allowed([sequences[row] for row in bound], vocab).to(logits.device)
            logits[at] = logits[at].masked_fill(~allowed, -torch.inf)
        return logits

    def _draw_random(self, logits: torch.Tensor, rows: _Rows) -> torch.Tensor:
        drawn = np.array([rows.sequences[row].output_len for row in rows.random], dtype=np.uint64)
        uniforms = torch.from_numpy(sampling.uniform(rows.seeds, drawn)).to(logits.device, non_blocking=True)
        return sampling.draw(logits.float(), rows.temperature, rows.filters, uniforms)


def _column(
    values: SequenceOf[float], device: torch.device, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


def _biases(
    params: SequenceOf[SamplingParams], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Rows, tokens and what is added to their logits; the last of a token's biases counts."""
    biased = [(row, *item) for row, p in enumerate(params) for item in dict(p.biases).items()]
    if not biased:
        return None
    rows, tokens, biases = zip(*biased, strict=True)
    return (
        _column(rows, device, torch.int64),
        _column(tokens, device, torch.int64),
        _column(biases, device),
    )


def _filters(params: SequenceOf[SamplingParams], vocab: int, device: torch.device) -> sampling.Filters | None:
    """None where all tokens may be drawn."""
    if not any(0 < p.top_k < vocab or p.top_p < 1 or p.min_p > 0 for p in params):
        return None
    top_k = [min(p.top_k, vocab) if p.top_k > 0 else vocab for p in params]
    return sampling.Filters(
        top_k=_column(top_k, device, torch.int64),
        top_p=_column([p.top_p for p in params], device),
        min_p=_column([p.min_p for p in params], device),
        most=max(top_k),
    )


def _allowed(sequences: SequenceOf[Sequence], vocab: int) -> torch.Tensor:
    """bool `[rows, vocab]`: what each sequence's grammar lets come next."""
    allowed = torch.zeros(len(sequences), vocab, dtype=torch.bool)
    for row, sequence in zip(allowed, sequences, strict=True):
        if sequence.matcher is not None:
            tokens = torch.from_numpy(sequence.matcher.allowed()[:vocab])
            row[: len(tokens)] = tokens
    return allowed


def _counts(texts: SequenceOf[SequenceOf[int]], vocab: int, device: torch.device) -> torch.Tensor:
    """float32 `[texts, vocab]`: how often each token is in each text."""
    row = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
    flat = row * vocab + np.concatenate([np.asarray(text, dtype=np.int64) for text in texts])
    counted = np.bincount(flat, minlength=len(texts) * vocab).astype(np.float32)
    return torch.from_numpy(counted.reshape(len(texts), vocab)).to(device)


def _penalties(
    sequences: SequenceOf[Sequence], vocab: int, device: torch.device
) -> sampling.Penalties | None:
    """All but the counts of the output, which change at every step."""
    if not sequences:
        return None
    params = [sequence.params for sequence in sequences]
    prompts = [sequence.request.prompt_token_ids for sequence in sequences]
    return sampling.Penalties(
        prompt=_counts(prompts, vocab, device) > 0,
        output=torch.empty(0),
        repetition=_column([p.repetition_penalty for p in params], device).unsqueeze(1),
        presence=_column([p.presence_penalty for p in params], device).unsqueeze(1),
        frequency=_column([p.frequency_penalty for p in params], device).unsqueeze(1),
    )
