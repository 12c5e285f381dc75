"""The draw of a batch by strobe's CUDA kernels: one launch, a second one for log-probabilities.

Nothing of it waits for the device, and next to nothing depends on a token that the host has not read: the
kernel counts positions and penalised tokens on itself. Only a grammar must be told each token.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import torch

from strobe.engine.request import Sequence
from strobe.engine.transfer import Mailboxes, Tokens
from strobe.ops import sampling_cuda
from strobe.ops.sampling_cuda import EDIT, ROW


@dataclass(eq=False)
class _Row:
    """What one sequence is drawn by: its ROW and EDITs as bytes, all but positions and places.

    `counts` int32 `[vocab]` on the device holds twice how often a token is in the output, and one more
    where it is in the prompt, after `counted` tokens of output: 4 bytes a token of the vocabulary, as much
    as a few tokens of the sequence in the KV cache, and only for sequences with penalties.
    """

    row: bytes
    edits: bytes
    counts: torch.Tensor | None = None
    counted: int = -1


class CudaDraw:
    """`stop_ids` are the model's own end tokens, which `min_tokens` forbids; a draw is of up to `rows`."""

    def __init__(self, stop_ids: SequenceOf[int], vocab: int, device: torch.device, rows: int) -> None:
        self._stop_ids = tuple(stop_ids)
        self._vocab, self._device = vocab, device
        self._table = sampling_cuda.Table(device)
        self._on_host = Mailboxes(rows)
        self._rows: WeakKeyDictionary[Sequence, _Row] = WeakKeyDictionary()
        self._loaded: tuple[Sequence, ...] = ()
        self._next: list[int] = []
        """The positions that the table on the device stands at."""

    def waits_for(self, sequences: SequenceOf[Sequence]) -> bool:
        """True where the host must know the tokens before: a grammar goes on from them, and counts that
        are not on the device yet are taken from them."""
        return any(
            sequence.matcher is not None or (sequence.params.penalised and not self._counted(sequence))
            for sequence in sequences
        )

    def draw(
        self, logits: torch.Tensor, sequences: SequenceOf[Sequence], out: torch.Tensor | None = None
    ) -> Tokens:
        """A token id for each sequence from its row of `logits` `[rows, vocab]`, in `out` where it is given.
        The kernel writes them to the host itself: a copy behind it would take longer than it does."""
        sequences = tuple(sequences)
        copy = self._on_host.next(len(sequences))
        if all(sequence.params.plain for sequence in sequences):
            return Tokens(sampling_cuda.sample(logits, out=out, copy=copy), copy)
        penalised = [sequence for sequence in sequences if sequence.params.penalised]
        recounted = [self._count(sequence) for sequence in penalised if not self._counted(sequence)]
        positions = [sequence.output_len for sequence in sequences]
        if recounted or sequences != self._loaded or positions != self._next:
            self._load(sequences, positions)
        allowed = self._allowed(sequences)
        token_ids = sampling_cuda.sample(logits, self._table, allowed, out=out, copy=copy)
        self._next = [position + 1 for position in positions]
        for sequence in penalised:
            self._rows[sequence].counted += 1
        return Tokens(token_ids, copy)

    def logprobs(
        self, logits: torch.Tensor, tokens: torch.Tensor, top: int, rows: list[int] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As `sampling.logprobs`, of some rows of both or of all."""
        if rows is None or len(rows) == len(tokens):
            return sampling_cuda.logprobs(logits, tokens, top)
        chosen = torch.tensor(rows, dtype=torch.int32).to(self._device, non_blocking=True)
        return sampling_cuda.logprobs(logits, tokens, top, chosen)

    def _row(self, sequence: Sequence) -> _Row:
        found = self._rows.get(sequence)
        if found is None:
            found = self._rows[sequence] = self._pack(sequence)
        return found

    def _pack(self, sequence: Sequence) -> _Row:
        p = sequence.params
        forbidden = dict.fromkeys((*self._stop_ids, *p.stop_token_ids) if p.min_tokens else ())
        biases = dict(p.biases)
        edits = [*biases.items(), *((token, 0.0) for token in forbidden if token < self._vocab)]
        row = sampling_cuda.greedy_row(sequence.seed, self._vocab)
        row["temperature"], row["top_p"], row["min_tokens"] = p.temperature, p.top_p, p.min_tokens
        row["top_k"] = min(p.top_k, self._vocab) if p.top_k > 0 else self._vocab
        row["log_min_p"] = torch.tensor(p.min_p).log().item()
        row["repetition"], row["presence"] = p.repetition_penalty, p.presence_penalty
        row["frequency"] = p.frequency_penalty
        row["biases"], row["forbidden"] = len(biases), len(edits) - len(biases)
        return _Row(row.tobytes(), np.array(edits, EDIT).tobytes())

    def _counted(self, sequence: Sequence) -> bool:
        row = self._rows.get(sequence)
        return row is not None and row.counted == sequence.output_len

    def _count(self, sequence: Sequence) -> _Row:
        """Count the tokens that the host knows, all of which it has read."""
        row = self._row(sequence)
        row.counts = torch.zeros(self._vocab, dtype=torch.int32, device=self._device)
        prompt = torch.tensor(sequence.request.prompt_token_ids).to(self._device, non_blocking=True)
        row.counts.index_fill_(0, prompt, 1)
        if sequence.output:
            output = torch.tensor(sequence.output).to(self._device, non_blocking=True)
            row.counts.index_add_(0, output, torch.full_like(output, 2, dtype=torch.int32))
        row.counted = len(sequence.output)
        return row

    def _load(self, sequences: tuple[Sequence, ...], positions: list[int]) -> None:
        """Send how each row is drawn."""
        packed = [self._row(sequence) for sequence in sequences]
        rows = np.frombuffer(bytearray().join(row.row for row in packed), ROW)
        edits = np.frombuffer(b"".join(row.edits for row in packed), EDIT)
        counts = rows["biases"] + rows["forbidden"]
        rows["edits"] = np.cumsum(counts) - counts
        rows["position"] = positions
        rows["counts"] = [0 if row.counts is None else row.counts.data_ptr() for row in packed]
        bound = [row for row, sequence in enumerate(sequences) if sequence.matcher is not None]
        rows["mask"][bound] = np.arange(len(bound))
        self._table.load(rows, edits)
        self._loaded = sequences

    def _allowed(self, sequences: tuple[Sequence, ...]) -> torch.Tensor | None:
        """int32 `[masks, words]`, a bit a token: what each grammar lets come next."""
        matchers = [(s.matcher, s.finish_reason) for s in sequences if s.matcher is not None]
        if not matchers:
            return None
        words = np.zeros((len(matchers), -(-self._vocab // 32)), np.int32)
        for row, (matcher, over) in zip(words.view(np.uint8), matchers, strict=True):
            if over is None:
                bits = np.packbits(matcher.allowed()[: self._vocab], bitorder="little")
                row[: len(bits)] = bits
            else:  # what it draws is dropped
                row[:] = 0xFF
        return torch.from_numpy(words).to(self._device, non_blocking=True)
