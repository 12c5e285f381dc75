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

_SHORT = 256
"""Rows up to this many keys share a call whatever their lengths: a call costs more than its padding."""


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
            q if part.rows is None else q[part.rows],
            part.gather(k, part.k),
            part.gather(v, part.v),
            attn_mask=part.mask,
            scale=problem.scale,
        )
        if part.rows is None:
            out.copy_(answer)
        else:
            out[part.rows] = answer


@dataclass(frozen=True, eq=False)
class _Part:
    """Rows of similar length, padded to the longest. `rows` None stands for all.

    `at` are slots of the cache, `[rows * kv_len]`, or a slice where they lie in a row already. Padding
    points at the row's first key, which `mask` (float32 `[rows, 1, 1, kv_len]`) hides. `k` and `v` are
    the buffers, `[rows * kv_len, kv_heads, head_dim]`.
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
    """Made once for all layers of a forward pass that have the same window."""
    layout = cast(Paged, problem.layout)
    key = f"torch_grouped {problem.window}"
    if key not in layout.scratch:
        lens, table = np.array(layout.host_lens), layout.page_table.numpy()
        size = np.frexp(np.maximum(lens, _SHORT))[1]
        groups = [np.flatnonzero(size == each) for each in np.unique(size)]
        layout.scratch[key] = [
            _part(problem, rows if len(groups) > 1 else None, lens[rows], table[rows], k) for rows in groups
        ]
    return layout.scratch[key]


def _part(
    problem: AttentionProblem, rows: np.ndarray | None, lens: np.ndarray, table: np.ndarray, k: torch.Tensor
) -> _Part:
    page_size, longest = problem.page_size, int(lens.max())
    pages = table[:, : -(-longest // page_size)].astype(np.int64)
    at = (pages[:, :, None] * page_size + np.arange(page_size)).reshape(len(lens), -1)[:, :longest]
    key, mask = np.arange(longest), None
    seen = key < lens[:, None]
    if problem.window[0] != UNLIMITED:
        seen &= key >= (lens - 1 - problem.window[0])[:, None]
    if not seen.all():
        at = np.where(key < lens[:, None], at, at[:, :1])
        mask = torch.zeros(seen.shape, dtype=k.dtype)
        mask.masked_fill_(torch.from_numpy(~seen), -torch.inf)
        mask = mask[:, None, None]
    slots: torch.Tensor | slice
    if len(lens) == 1 and at[0, -1] - at[0, 0] == longest - 1 and (np.diff(at[0]) == 1).all():
        slots, k_buffer, v_buffer = slice(int(at[0, 0]), int(at[0, 0]) + longest), k[:0], k[:0]
    else:
        slots = torch.from_numpy(np.ascontiguousarray(at).reshape(-1))
        k_buffer, v_buffer = (k.new_empty(len(lens) * longest, *k.shape[1:]) for _ in range(2))
    index = None if rows is None else torch.from_numpy(rows)
    return _Part(index, len(lens), slots, mask, k_buffer, v_buffer)
