"""Decode on a CPU over the pages where they lie: nothing is gathered, padded or copied.

A key head's queries read its keys a few at a time, while they are in the first cache, with a running
maximum and sum (docs/math.md, eq. 5). Rows and heads are dealt out to as many threads as torch has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch

from strobe.attention.problem import AttentionProblem, Paged
from strobe.cpu import jit, threads

IDEA = "keys and values read in their pages by compiled code, once for their group's queries"

_KERNEL = "strobe.attention.decode.numba_paged_kernel"
_THREAD_FLOATS = 1 << 21
"""Floats of keys and values that are worth a thread of their own."""


def refusals(problem: AttentionProblem) -> list[str]:
    reasons = list(jit.refusals())
    if not isinstance(problem.layout, Paged):
        reasons.append(f"layout {type(problem.layout).__name__}; supported: Paged")
    if problem.device != "cpu":
        reasons.append(f"tensors on {problem.device}; needs a CPU")
    if problem.dtype != "float32" or problem.kv_dtype != "float32":
        reasons.append(f"q in {problem.dtype}, cache in {problem.kv_dtype}; supported: float32")
    return reasons


def run(
    problem: AttentionProblem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    dense_out, dense_lse = out.contiguous(), None if lse is None else lse.contiguous()
    prepare(problem, q, k, v)(q, k, v, dense_out, dense_lse)
    if dense_out is not out:
        out.copy_(dense_out)
    if lse is not None and dense_lse is not None and dense_lse is not lse:
        lse.copy_(dense_lse)


@dataclass(frozen=True, eq=False)
class _Call:
    """`attend` with all that the layers of one forward pass share; `addresses` are of `kept`'s memory."""

    attend: Callable[..., None]
    addresses: tuple[float, ...]
    ranges: list[tuple[int, int]]
    kept: tuple[Any, ...]

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor | None
    ) -> None:
        given = q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), 0 if lse is None else lse.data_ptr()
        if len(self.ranges) == 1:
            self.attend(*given, *self.addresses, *self.ranges[0])
        else:
            threads.run(partial(self.attend, *given, *self.addresses), self.ranges)


def prepare(problem: AttentionProblem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> _Call:
    layout = cast(Paged, problem.layout)
    indices = [layout.page_table, layout.seq_lens, layout.cu_seqlens_q]
    given = [None if x is None else x.contiguous() for x in indices]
    given.append(None if problem.sinks is None else problem.sinks.float().contiguous())
    sizes = np.array(
        [problem.batch, q.shape[0], problem.q_len, problem.q_heads, problem.kv_heads]
        + [problem.page_size, layout.page_table.shape[1], *problem.window]
        + [4 * n for n in (0 if problem.packed_q else q.stride(0), *q.stride()[-3:-1])]
        + [4 * n for n in (*k.stride()[:3], *v.stride()[:3])],
        dtype=np.int64,
    )
    scale = problem.head_dim**-0.5 if problem.scale is None else problem.scale
    tensors = [0 if x is None else x.data_ptr() for x in given]
    addresses = (*tensors, sizes.ctypes.data, scale, problem.softcap)
    return _Call(jit.kernels(_KERNEL).kernel(problem.head_dim), addresses, _ranges(problem), (given, sizes))


def _ranges(problem: AttentionProblem) -> list[tuple[int, int]]:
    """The key heads of all rows, counted row by row, in parts of equal work: one a thread."""
    lengths, kv_heads = problem.row_lengths(), problem.kv_heads
    work = [q_len * kv_len * kv_heads for q_len, kv_len in lengths]
    worth = 2 * problem.head_dim * sum(work) // _THREAD_FLOATS
    n = min(torch.get_num_threads(), worth)
    if n <= 1:
        return [(0, len(work) * kv_heads)]
    ends = np.cumsum(np.repeat(work, kv_heads))
    cuts = np.searchsorted(ends, ends[-1] * np.arange(1, n) // n).tolist()
    return [(begin, end) for begin, end in pairwise([0, *cuts, len(ends)]) if begin < end]
