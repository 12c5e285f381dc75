"""FlashAttention-2 in Triton: the compiler places the copies, the shared memory and the tensor cores."""

from __future__ import annotations

import math

import torch

from strobe.attention import dense, triton
from strobe.attention.problem import UNLIMITED, AttentionProblem, Packed, Paged

IDEA = "one kernel of Triton tiles: the compiler does what the CUDA rungs do by hand"

_DTYPES = ("float16", "bfloat16")
_HEAD_DIMS = (32, 64, 128, 256)
_LONG = 2048
"""Keys from which a problem is tuned as a long one."""


def refusals(problem: AttentionProblem) -> list[str]:
    reasons = triton.refusals(problem)
    if problem.dtype not in _DTYPES:
        reasons.append(f"dtype {problem.dtype}; supported: {', '.join(_DTYPES)}")
    elif problem.kv_dtype != problem.dtype:
        reasons.append(f"k and v in {problem.kv_dtype}; supported: q's dtype")
    if problem.head_dim not in _HEAD_DIMS:
        reasons.append(f"head_dim {problem.head_dim}; supported: {', '.join(map(str, _HEAD_DIMS))}")
    if problem.window not in ((UNLIMITED, UNLIMITED), (UNLIMITED, 0)):
        reasons.append(f"window {problem.window}; supported: none, or causal")
    if isinstance(problem.layout, Paged):
        reasons.append("no paged cache")
    if problem.softcap:
        reasons.append("no softcap")
    if problem.sinks is not None:
        reasons.append("no sinks")
    if not problem.scale or problem.scale < 0:
        reasons.append(f"scale {problem.scale}; supported: above 0")
    if (rows := problem.batch * problem.q_heads) > dense.GRID_MAX:
        reasons.append(f"batch x q_heads {rows}; supported: up to {dense.GRID_MAX}")
    return reasons


def run(
    problem: AttentionProblem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    from strobe.attention.prefill.triton_fused_kernel import TensorDescriptor, launch

    if not k.numel():
        out.zero_()
        if lse is not None:
            lse.fill_(-math.inf)
        return
    rows = (_as_rows(tensor) for tensor in (q, k, v))
    described = [TensorDescriptor(r, list(r.shape), list(r.stride()), [1, problem.head_dim]) for r in rows]
    sums = (out, out)
    if packed := isinstance(problem.layout, Packed):
        sums = problem.layout.cu_seqlens_q, problem.layout.cu_seqlens_kv

    def grid(config: dict[str, int]) -> tuple[int, int]:
        return -(-problem.q_len // config["Q_TILE"]), problem.batch * problem.q_heads

    launch(
        grid,
        out.get_device(),
        *described,
        out,
        # of lse's dtype also where there is none: the tuner tells problems apart by dtypes too
        torch.empty(0, dtype=torch.float32, device=out.device) if lse is None else lse,
        *sums,
        problem.q_len,
        problem.kv_len,
        problem.q_heads,
        0 if packed else out.stride(0),
        out.stride(-3),
        out.stride(-2),
        0 if packed or lse is None else lse.stride(0),
        0 if lse is None else lse.stride(-2),
        problem.scale * math.log2(math.e),
        HEAD_DIM=problem.head_dim,
        GROUP=problem.group,
        CAUSAL=problem.window[1] == 0,
        PACKED=packed,
        WITH_LSE=lse is not None,
        LONG=problem.kv_len >= _LONG,
    )


def _as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """`[(batch,) length, heads, dim]` as `[rows, heads x dim]`: a view where the strides allow it."""
    *leading, heads, dim = tensor.shape
    rows = tensor.flatten(-2) if tensor.stride(-2) == dim else tensor.reshape(*leading, heads * dim)
    rows = rows.flatten(0, 1) if rows.dim() == 3 else rows
    odd = rows.stride(0) * rows.element_size() % 16 or rows.data_ptr() % 16
    return rows.clone(memory_format=torch.contiguous_format) if odd else rows
