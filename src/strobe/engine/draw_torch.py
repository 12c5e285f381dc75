"""The draw of a batch by PyTorch's operations, on any device."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import numpy as np
import torch

from strobe.engine.request import Sequence
from strobe.engine.sampling_params import SamplingParams
from strobe.ops import sampling


class _Rows:
    """What stays as it is while the same sequences draw: numbers by row, indices of who needs what."""

    def __init__(self, sequences: tuple[Sequence, ...], vocab: int, device: torch.device) -> None:
        params = [sequence.params for sequence in sequences]
        self.sequences = sequences
        self.plain = all(p.plain for p in params)
        self.bound = [row for row, sequence in enumerate(sequences) if sequence.matcher is not None]
        self.penalised = [row for row, p in enumerate(params) if p.penalised]
        self.at_least = [row for row, p in enumerate(params) if p.min_tokens > 0]
        biased = [(row, *item) for row, p in enumerate(params) for item in p.biases]
        self.biased = tuple(zip(*biased, strict=True)) if biased else ()
        self.random = [row for row, p in enumerate(params) if not p.greedy]
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

    def draw(self, logits: torch.Tensor, sequences: SequenceOf[Sequence]) -> torch.Tensor:
        """A token id, int64 `[rows]`, for each sequence from its row of `logits` `[rows, vocab]`."""
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
            token_ids[rows.random] = self._draw_random(logits[rows.random], rows)
        return token_ids

    def logprobs(
        self, logits: torch.Tensor, tokens: torch.Tensor, top: int, rows: list[int] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As `sampling.logprobs`, of some rows of both or of all."""
        if rows is not None and len(rows) < len(tokens):
            logits, tokens = logits[rows], tokens[rows]
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
        if not (forbidden or rows.penalised or rows.biased or bound):
            return logits
        logits = logits.float().clone()
        if rows.penalised:
            penalties = _penalties([sequences[row] for row in rows.penalised], vocab, logits.device)
            logits[rows.penalised] = sampling.penalise(logits[rows.penalised], penalties)
        if forbidden:
            at, tokens = zip(*forbidden, strict=True)
            logits[list(at), list(tokens)] = -torch.inf
        if rows.biased:
            at, tokens, biases = rows.biased
            logits[list(at), list(tokens)] += torch.tensor(biases).to(logits.device)
        if bound:
            allowed = _allowed([sequences[row] for row in bound], vocab)
            logits[bound] = logits[bound].masked_fill(~allowed.to(logits.device), -torch.inf)
        return logits

    def _draw_random(self, logits: torch.Tensor, rows: _Rows) -> torch.Tensor:
        drawn = np.array([rows.sequences[row].output_len for row in rows.random], dtype=np.uint64)
        uniforms = torch.from_numpy(sampling.uniform(rows.seeds, drawn)).to(logits.device, non_blocking=True)
        return sampling.draw(logits.float(), rows.temperature, rows.filters, uniforms)


def _column(
    values: SequenceOf[float], device: torch.device, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


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


def _penalties(sequences: SequenceOf[Sequence], vocab: int, device: torch.device) -> sampling.Penalties:
    def counts(texts: list[SequenceOf[int]]) -> torch.Tensor:
        row = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
        flat = row * vocab + np.concatenate([np.asarray(text, dtype=np.int64) for text in texts])
        counted = np.bincount(flat, minlength=len(texts) * vocab).astype(np.float32)
        return torch.from_numpy(counted.reshape(len(texts), vocab)).to(device)

    params = [sequence.params for sequence in sequences]
    return sampling.Penalties(
        prompt=counts([sequence.request.prompt_token_ids for sequence in sequences]) > 0,
        output=counts([sequence.output for sequence in sequences]),
        repetition=_column([p.repetition_penalty for p in params], device).unsqueeze(1),
        presence=_column([p.presence_penalty for p in params], device).unsqueeze(1),
        frequency=_column([p.frequency_penalty for p in params], device).unsqueeze(1),
    )
