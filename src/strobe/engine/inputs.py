"""A schedule as arrays: what one forward pass is told, still on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from strobe.engine.scheduler import Chunk, Schedule

_NARROWEST_TABLE = 64
_SPREAD = 64
"""`cuda_paged` gives each block as many keys, and so all rows of one key to a single block where they stand
together: 112 of them took 0.18 ms a layer."""


@dataclass(frozen=True)
class StepInputs:
    """The tokens of all rows end to end, NumPy; shapes and meaning as in `models.batch.Batch`.

    `picks` int64 `[tokens]` says where each token's id is found: from `first_word` on in `token_ids`, below
    it among those that the step before drew, which the host has not read. None where the host knows all.
    `copies` int64 `[2, n]` are pages to copy first, from and to. The first `decoding` rows bring one token
    each, and `cu_seqlens` counts those of the rows behind them; 0 where all rows bring as many.
    """

    token_ids: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    logits_at: np.ndarray | None
    page_table: np.ndarray
    seq_lens: np.ndarray
    cu_seqlens: np.ndarray | None
    picks: np.ndarray | None
    copies: np.ndarray | None
    max_q_len: int
    max_kv_len: int
    decoding: int = 0


def inputs_of(schedule: Schedule, page_size: int, first_word: int) -> StepInputs:
    """The schedule's tokens, rows in the order of its chunks: those of one token come first."""
    chunks = schedule.chunks
    starts = np.array([chunk.start for chunk in chunks], dtype=np.int64)
    ends = np.array([chunk.end for chunk in chunks], dtype=np.int64)
    counts = ends - starts
    table = _page_table(chunks)
    row_ends = np.cumsum(counts)
    uniform = bool((counts == counts[0]).all())
    if uniform and counts[0] == 1:
        positions, rows = starts, np.arange(len(chunks))
    else:
        rows = np.repeat(np.arange(len(chunks)), counts)
        positions = np.arange(row_ends[-1]) + (ends - row_ends)[rows]
    decoding = 0 if uniform else int(np.argmax(counts > 1))
    logits_at: np.ndarray | None = None  # of all tokens
    if not schedule.decodes:
        scored = [np.arange(row_ends[i] - counts[i], row_ends[i]) for i in schedule.scored]
        logits_at = np.concatenate([row_ends[list(schedule.sampled_chunks)] - 1, *scored])
    return StepInputs(
        token_ids=_token_ids(chunks),
        positions=positions,
        slots=table[rows, positions // page_size].astype(np.int64) * page_size + positions % page_size,
        logits_at=logits_at,
        page_table=table,
        seq_lens=ends.astype(np.int32),
        cu_seqlens=None if uniform else np.cumsum([0, *counts[decoding:]], dtype=np.int32),
        picks=_picks(chunks, row_ends, first_word),
        copies=np.array(schedule.copies, dtype=np.int64).T if schedule.copies else None,
        max_q_len=int(counts.max()),
        max_kv_len=int(ends.max()),
        decoding=decoding,
    )


def table_width(pages: int) -> int:
    """Pages that the rows of a padded table hold where the longest has so many: one of few numbers, since
    each is a CUDA graph of its own, and not much more than needed, since all of it is copied every step."""
    width = _NARROWEST_TABLE
    while width < pages:
        width *= 4
    return width


def padded(inputs: StepInputs, rows: int, page_size: int, first_word: int, nobody: int) -> StepInputs:
    """Inputs of one token a row with more rows, `rows` in all, and a table as wide as `table_width` says.

    A row that pads is a sequence of one token in page `nobody`, which no sequence owns: all of them write the
    same key there, and read it. From `_SPREAD` rows on they stand evenly between the others, whose order
    `logits_at` then tells.
    """
    count = len(inputs.page_table)
    spread = rows >= _SPREAD
    at = np.arange(count) * rows // count if spread else np.arange(count)
    picks = inputs.picks if inputs.picks is not None else first_word + np.arange(count)
    wide = np.zeros((rows, table_width(inputs.page_table.shape[1])), dtype=np.int32)
    wide[:, 0] = nobody
    wide[at, : inputs.page_table.shape[1]] = inputs.page_table
    return replace(
        inputs,
        token_ids=_filled(inputs.token_ids, rows, 0),
        positions=_placed(inputs.positions, at, rows, 0),
        slots=_placed(inputs.slots, at, rows, nobody * page_size),
        logits_at=_filled(at, rows, 0) if spread else None,
        page_table=wide,
        seq_lens=_placed(inputs.seq_lens, at, rows, 1),
        picks=_placed(picks, at, rows, first_word + rows - 1),
        max_kv_len=wide.shape[1] * page_size,
    )


def padded_prompt(inputs: StepInputs, tokens: int, page_size: int, nobody: int) -> StepInputs:
    """Inputs of one row with more tokens, `tokens` in all: they belong to no row, and go to page `nobody`."""
    longest = inputs.page_table.shape[1]
    table = np.zeros((1, table_width(longest)), dtype=np.int32)
    table[:, :longest] = inputs.page_table
    return replace(
        inputs,
        token_ids=_filled(inputs.token_ids, tokens, 0),
        positions=_filled(inputs.positions, tokens, 0),
        slots=_filled(inputs.slots, tokens, nobody * page_size),
        page_table=table,
        cu_seqlens=np.array([0, len(inputs.token_ids)], dtype=np.int32),
        max_q_len=tokens,
        max_kv_len=table.shape[1] * page_size,
    )


def _filled(array: np.ndarray, size: int, value: int) -> np.ndarray:
    return _placed(array, np.arange(len(array)), size, value)


def _placed(array: np.ndarray, at: np.ndarray, size: int, value: int) -> np.ndarray:
    """`size` elements: those of `array` at `at`, elsewhere `value`."""
    placed = np.full(size, value, dtype=array.dtype)
    placed[at] = array
    return placed


def _token_ids(chunks: Sequence[Chunk]) -> np.ndarray:
    """int64 `[tokens]`; 0 stands for one that the host does not know."""
    found: list[int] = []
    for sequence, start, end in chunks:
        found += sequence.tokens[start:end]
        if end > len(sequence.tokens):
            found.append(0)
    return np.array(found, dtype=np.int64)


def _picks(chunks: Sequence[Chunk], row_ends: np.ndarray, first_word: int) -> np.ndarray | None:
    unread = [index for index, (sequence, _, end) in enumerate(chunks) if end > len(sequence.tokens)]
    if not unread:
        return None
    picks = first_word + np.arange(row_ends[-1])
    picks[row_ends[unread] - 1] = [chunks[index].sequence.row for index in unread]
    return picks


def _page_table(chunks: Sequence[Chunk]) -> np.ndarray:
    """int32 `[rows, longest]`; past a row's pages it holds 0, which nothing reads."""
    lists = [chunk.sequence.pages.pages for chunk in chunks]
    table = np.zeros((len(lists), max(map(len, lists))), dtype=np.int32)
    for row, pages in zip(table, lists, strict=True):
        row[: len(pages)] = pages
    return table
