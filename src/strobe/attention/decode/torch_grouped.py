"""Decode on a CPU: the queries that share a key head are the rows of one product.

A key head's cache is read once for its whole group of queries, not once a query head. The gathered
keys and values of all layers go through the same two buffers, which stay in the processor's cache:
fresh memory for each layer costs more in page faults than the copy itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F

from strobe.attention.problem import UNLIMITED, AttentionProblem, Paged

IDEA = "queries of one key head as rows of one product, keys gathered into buffers that layers share"

_PART_TOKENS = 1024
"""Keys gathered at once: with their values they fit a second-level cache (1 MiB at 128 floats a token)."""


def refusals(problem: AttentionProblem) -> list[str]:
    layout = problem.layout
    if not isinstance(layout, Paged) or problem.q_len != 1 or problem.packed_q:
        return ["one query a row over a paged cache only"]
    if problem.device != "cpu":
        return ["reads lengths on the host: CPU only"]
    reasons = []
    if problem.softcap:
        reasons.append("no softcap")
    if problem.sinks is not None:
        reasons.append("no sinks")
    if problem.kv_dtype != problem.dtype:
        reasons.append(f"cache in {problem.kv_dtype}; needs q's dtype")
    if problem.return_lse:
        reasons.append("gives no lse")
    if 0 in layout.host_lens:
        reasons.append("no row without keys")
    return reasons


def run(
    problem: AttentionProblem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    grouped = (problem.batch, problem.kv_heads, problem.group, problem.head_dim)
    q, out = q.view(grouped), out.view(grouped)
    k, v = k.flatten(0, 1), v.flatten(0, 1)
    for part in _parts(problem, k):
        answer = F.scaled_dot_product_attention(
            q if part.rows is None else q.index_select(0, part.rows),
            part.gather(k, part.k),
            part.gather(v, part.v),
            attn_mask=part.mask,
            scale=problem.scale,
        )
        if part.rows is None:
            out.copy_(answer)
        else:
            out.index_copy_(0, part.rows, answer)


@dataclass(frozen=True, eq=False)
class _Part:
    """Rows of similar length, padded to the longest. `rows` None stands for all.

    `at` are slots of the cache, `[rows * kv_len]`, or a slice where they lie in a row already. Padding
    points at the row's first key, which `mask` (q's dtype, `[rows, 1, 1, kv_len]`) hides. `k` and `v` are
    the buffers, `[rows * kv_len, kv_heads, head_dim]`, which all parts share.
    """

    rows: torch.Tensor | None
    count: int
    at: torch.Tensor | slice
    mask: torch.Tensor | None
    k: torch.Tensor
    v: torch.Tensor

    def gather(self, cache: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
        """`[rows, kv_heads, kv_len, head_dim]`"""
        if isinstance(self.at, slice):
            return cache[self.at].transpose(0, 1).unsqueeze(0)
        tokens = torch.index_select(cache, 0, self.at, out=buffer)
        return tokens.view(self.count, -1, *cache.shape[1:]).transpose(1, 2)


def _parts(problem: AttentionProblem, k: torch.Tensor) -> list[_Part]:
    """Made once for all layers of a forward pass that have the same window and caches that are alike."""
    layout = cast(Paged, problem.layout)
    key = "torch_grouped", problem.window, problem.page_size, k.shape[1:], k.dtype
    if key not in layout.scratch:
        lens, table = np.array(layout.host_lens), layout.page_table.numpy()
        members = _split(lens)
        padded = max(len(rows) * int(lens[rows].max()) for rows in members)
        buffers = [k.new_empty(padded, *k.shape[1:]) for _ in range(2)]
        parts = [_part(problem, rows, lens[rows], table[rows], buffers) for rows in members]
        layout.scratch[key] = parts
    return layout.scratch[key]


def _split(lens: np.ndarray) -> list[np.ndarray]:
    """All rows as they stand where they fit `_PART_TOKENS`, else cut by length, the shortest rows first."""
    if len(lens) * lens.max() <= _PART_TOKENS:
        return [np.arange(len(lens))]
    order = np.argsort(lens, kind="stable")
    parts, first = [], 0
    for end in range(1, len(order)):
        if (end + 1 - first) * lens[order[end]] > _PART_TOKENS:
            parts.append(order[first:end])
            first = end
    return [*parts, order[first:]]


def _part(
    problem: AttentionProblem,
    rows: np.ndarray,
    lens: np.ndarray,
    table: np.ndarray,
    buffers: list[torch.Tensor],
) -> _Part:
    k_buffer, v_buffer = buffers
    page_size, longest = problem.page_size, int(lens.max())
    pages = table[:, : -(-longest // page_size)].astype(np.int64)
    index = torch.from_numpy(rows) if len(rows) < problem.batch else None
    key, mask = np.arange(longest), None
    seen = key < lens[:, None]
    if problem.window[0] != UNLIMITED:
        seen &= key >= (lens - 1 - problem.window[0])[:, None]
    if not seen.all():
        hidden = torch.from_numpy(~seen)
        mask = k_buffer.new_zeros(seen.shape).masked_fill_(hidden, -torch.inf)[:, None, None]
    if len(lens) == 1 and (pages[0] == np.arange(pages[0, 0], pages[0, 0] + pages.shape[1])).all():
        first = int(pages[0, 0]) * page_size
        return _Part(index, 1, slice(first, first + longest), mask, k_buffer, v_buffer)
    at = (pages[:, :, None] * page_size + np.arange(page_size)).reshape(len(lens), -1)[:, :longest]
    at = np.where(key < lens[:, None], at, at[:, :1]).reshape(-1)
    size = len(at)
    return _Part(index, len(lens), torch.from_numpy(at), mask, k_buffer[:size], v_buffer[:size])
