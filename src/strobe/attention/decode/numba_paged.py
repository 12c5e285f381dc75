"""A CPU's decode, and its prefill, over the pages where they lie: nothing is gathered, padded or copied.

A key head's queries read its keys a few at a time, while they are in the first cache, with a running
maximum and sum (docs/math.md, eq. 5). Rows and heads are dealt out to as many threads as torch has.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import numpy as np
import torch

from strobe.attention.problem import AttentionProblem, Paged
from strobe.cpu import jit, threads
from strobe.errors import ProblemError

IDEA = "on a CPU: keys and values read in their pages by compiled code, once for their group's queries"

_KERNEL = "strobe.attention.decode.numba_paged_kernel"
_THREAD_FLOATS = 1 << 16
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


class _Call(NamedTuple):
    """`attend` with all that the layers of one forward pass share; `address` is of `fixed`."""

    attend: jit.Kernel
    address: int
    threads: int
    fixed: np.ndarray
    kept: tuple[Any, ...]
    """What `fixed` holds addresses of."""

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor | None
    ) -> None:
        lse_at = 0 if lse is None else lse.data_ptr()
        numbers = q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), lse_at, self.address
        if threads.run(self.attend, numbers, self.threads):
            raise ProblemError("the layout's lengths or pages lie outside of q or of the cache")


def prepare(problem: AttentionProblem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> _Call:
    layout = cast(Paged, problem.layout)
    indices = [layout.page_table, layout.seq_lens, layout.cu_seqlens_q]
    kept = [None if x is None else x.contiguous() for x in indices]
    kept += [None if problem.sinks is None else problem.sinks.float().contiguous()]
    kept += [torch.tensor([problem.scale, problem.softcap], dtype=torch.float32)]
    most = threads.worth(2 * problem.head_dim * _pairs(problem), _THREAD_FLOATS)
    few = problem.batch * problem.q_len < 4 * most
    fixed = np.array(
        [0 if x is None else x.data_ptr() for x in kept]
        + [problem.batch, q.shape[:-2].numel(), problem.q_len, problem.q_heads, problem.kv_heads]
        + [k.shape[0], problem.page_size, layout.page_table.shape[1], *problem.window]
        + [1 if few else problem.kv_heads]
        + [4 * n for n in (0 if problem.packed_q else q.stride(0), *q.stride()[-3:-1])]
        + [4 * n for n in (*k.stride()[:3], *v.stride()[:3])],
        dtype=np.int64,
    )
    return _Call(jit.kernels(_KERNEL).kernel(problem.head_dim), fixed.ctypes.data, most, fixed, tuple(kept))


def _pairs(problem: AttentionProblem) -> int:
    """Of queries' tokens and keys, over the key heads."""
    return problem.kv_heads * sum(q_len * kv_len for q_len, kv_len in problem.row_lengths())
