"""A problem's rows as plain dense tensors, for the rungs that work a row at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from strobe.attention.problem import UNLIMITED, AttentionProblem, Packed, Paged


@dataclass(frozen=True, eq=False)
class Row:
    """One batch row: q `[q_len, q_heads, head_dim]`, k and v `[kv_len, kv_heads, head_dim]`.

    k and v of a paged cache are gathered, in q's dtype; in float32 where the cache has scales.
    """

    index: int
    q_start: int
    packed: bool
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    def visible(self, problem: AttentionProblem) -> torch.Tensor:
        """bool `[q_len, kv_len]` on the row's device."""
        return visible(problem, self.q.shape[0], self.k.shape[0], self.q.device)

    def write(self, out: torch.Tensor, row_out: torch.Tensor) -> None:
        """Put `row_out [q_heads, q_len, head_dim]` where the row stands in `out`."""
        target = out[self.q_start : self.q_start + len(self.q)] if self.packed else out[self.index]
        target.copy_(row_out.transpose(0, 1))

    def write_lse(self, lse: torch.Tensor, row_lse: torch.Tensor) -> None:
        """Put `row_lse [q_heads, q_len]` where the row stands in `lse`."""
        target = lse[:, self.q_start : self.q_start + len(self.q)] if self.packed else lse[self.index]
        target.copy_(row_lse)


def rows_of(problem: AttentionProblem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Iterator[Row]:
    """Every row of the problem, in order. Reads lengths on the host."""
    q_start = kv_start = 0
    layout, packed = problem.layout, problem.packed_q
    for index, (q_len, kv_len) in enumerate(problem.row_lengths()):
        row_q = q[q_start : q_start + q_len] if packed else q[index]
        if isinstance(layout, Paged):
            pages = layout.page_table[index, : -(-kv_len // problem.page_size)]
            row_k, row_v = (cache[pages].flatten(0, 1)[:kv_len].to(q.dtype) for cache in (k, v))
            if layout.k_scale is not None:
                row_k = row_k.float() * layout.k_scale[:, None]
                row_v = row_v.float() * layout.v_scale[:, None]
        elif isinstance(layout, Packed):
            row_k, row_v = k[kv_start : kv_start + kv_len], v[kv_start : kv_start + kv_len]
        else:
            row_k, row_v = k[index], v[index]
        yield Row(index, q_start, packed, row_q, row_k, row_v)
        q_start += q_len
        kv_start += kv_len


def visible(problem: AttentionProblem, q_len: int, kv_len: int, device: torch.device) -> torch.Tensor:
    """bool `[q_len, kv_len]`: which keys each query of a row of these lengths sees."""
    left, right = problem.window
    position = torch.arange(q_len, device=device).unsqueeze(1) + (kv_len - q_len)
    key = torch.arange(kv_len, device=device)
    seen = torch.ones(q_len, kv_len, dtype=torch.bool, device=device)
    if right != UNLIMITED:
        seen &= key <= position + right
    if left != UNLIMITED:
        seen &= key >= position - left
    return seen


@dataclass(frozen=True, eq=False)
class Head:
    """One head of one row in NumPy float32: q `[q_len, head_dim]`, k and v `[kv_len, head_dim]`."""

    row: Row
    index: int
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray

    def write(
        self, out: torch.Tensor, lse: torch.Tensor | None, head_out: np.ndarray, head_lse: np.ndarray
    ) -> None:
        """Put `head_out [q_len, head_dim]` and `head_lse [q_len]` where the head stands."""
        start, end = self.row.q_start, self.row.q_start + len(self.q)
        target = out[start:end, self.index] if self.row.packed else out[self.row.index, :, self.index]
        target.copy_(torch.from_numpy(np.ascontiguousarray(head_out)))
        if lse is not None:
            target = lse[self.index, start:end] if self.row.packed else lse[self.row.index, self.index]
            target.copy_(torch.from_numpy(np.ascontiguousarray(head_lse)))


def numpy_refusals(problem: AttentionProblem) -> list[str]:
    """Why the rungs that loop over `numpy_heads` cannot run this."""
    reasons = []
    if problem.device != "cpu":
        reasons.append("runs on the CPU only")
    if problem.dtype == "float64":
        reasons.append("works in float32; dtype is float64")
    if problem.softcap or problem.sinks is not None:
        reasons.append("no softcap, no sinks")
    return reasons


def numpy_heads(
    problem: AttentionProblem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> Iterator[Head]:
    """Every query head of every row, in order."""
    for row in rows_of(problem, q, k, v):
        row_q, row_k, row_v = (tensor.detach().float().numpy() for tensor in (row.q, row.k, row.v))
        for index in range(problem.q_heads):
            kv_head = index // problem.group
            yield Head(row, index, row_q[:, index], row_k[:, kv_head], row_v[:, kv_head])
