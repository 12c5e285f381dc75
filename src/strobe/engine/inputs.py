"""A schedule as arrays: what one forward pass is told, still on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from strobe.engine.scheduler import Chunk, Schedule

_NARROWEST_TABLE = 64


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
    same key there, and read it.
    """
    count = len(inputs.page_table)
    table = _widened(inputs.page_table, rows)
    table[count:, 0] = nobody
    picks = inputs.picks if inputs.picks is not None else first_word + np.arange(count)
    return replace(
        _with_more_tokens(inputs, rows, table, page_size, nobody),
        seq_lens=_filled(inputs.seq_lens, rows, 1),
        picks=np.concatenate([picks, first_word + np.arange(count, rows)]),
    )


def padded_prompt(inputs: StepInputs, tokens: int, page_size: int, nobody: int) -> StepInputs:
    """Inputs of one row with more tokens, `tokens` in all: they belong to no row, and go to page `nobody`."""
    return replace(
        _with_more_tokens(inputs, tokens, _widened(inputs.page_table, 1), page_size, nobody),
        cu_seqlens=np.array([0, len(inputs.token_ids)], dtype=np.int32),
        max_q_len=tokens,
    )


def _with_more_tokens(
    inputs: StepInputs, tokens: int, table: np.ndarray, page_size: int, nobody: int
) -> StepInputs:
    return replace(
        inputs,
        token_ids=_filled(inputs.token_ids, tokens, 0),
        positions=_filled(inputs.positions, tokens, 0),
        slots=_filled(inputs.slots, tokens, nobody * page_size),
        page_table=table,
        max_kv_len=table.shape[1] * page_size,
    )


def _widened(table: np.ndarray, rows: int) -> np.ndarray:
    count, longest = table.shape
    wide = np.zeros((rows, table_width(longest)), dtype=np.int32)
    wide[:count, :longest] = table
    return wide


def _filled(array: np.ndarray, size: int, value: int) -> np.ndarray:
    return np.concatenate([array, np.full(size - len(array), value, dtype=array.dtype)])


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
