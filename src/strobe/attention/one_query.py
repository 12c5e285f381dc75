"""What the teaching rungs of decode share: one query a row, a paged cache, the kernels' parameter."""

from __future__ import annotations

import ctypes
import math
from typing import cast

import torch

from strobe.attention import dense
from strobe.attention.problem import UNLIMITED, AttentionProblem, Paged
from strobe.cuda import jit, needs

_HEAD_DIMS = (64, 128, 192, 256)
_DTYPES = ("float16", "bfloat16")


def refusals(problem: AttentionProblem) -> list[str]:
    reasons = []
    if not problem.paged:
        reasons.append("needs a paged cache")
    if problem.q_len != 1 or problem.packed_q:
        reasons.append("one query a row only")
    if problem.dtype not in _DTYPES or problem.kv_dtype != problem.dtype:
        reasons.append(
            f"dtype {problem.dtype} over {problem.kv_dtype}; supported: {' or '.join(_DTYPES)} in both"
        )
    if problem.head_dim not in _HEAD_DIMS:
        reasons.append(f"head_dim {problem.head_dim}; supported: {', '.join(map(str, _HEAD_DIMS))}")
    if problem.window not in ((UNLIMITED, UNLIMITED), (UNLIMITED, 0)):
        reasons.append(f"window {problem.window}; supported: none, or causal")
    if problem.softcap:
        reasons.append("no softcap")
    if problem.sinks is not None:
        reasons.append("no sinks")
    if max(problem.batch, problem.q_heads) > dense.GRID_MAX:
        sizes = f"batch {problem.batch}, q_heads {problem.q_heads}"
        reasons.append(f"{sizes}; supported: up to {dense.GRID_MAX}")
    return reasons


def cuda_refusals(problem: AttentionProblem) -> list[str]:
    return needs.refusals(problem.device, problem.arch) + refusals(problem)


class Params(ctypes.Structure):
    """`DecodeParams` of warp_row.cuh."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "out", "lse", "seq_lens", "page_table")),
        *((name, ctypes.c_int64) for name in ("q_row", "q_head", "out_row", "out_head")),
        *((name, ctypes.c_int64) for name in ("k_page", "k_token", "k_head", "v_page", "v_token", "v_head")),
        *((name, ctypes.c_int) for name in ("table_stride", "group")),
        ("scale_log2", ctypes.c_float),
    ]


def params(
    problem: AttentionProblem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> Params:
    """q, k and v with rows on 16 bytes (`dense.aligned`)."""
    layout = cast(Paged, problem.layout)
    return Params(
        *(tensor.data_ptr() for tensor in (q, k, v, out)),
        None if lse is None else lse.data_ptr(),
        layout.seq_lens.data_ptr(),
        layout.page_table.data_ptr(),
        *(q.stride(0), q.stride(2), out.stride(0), out.stride(2)),
        *k.stride()[:3],
        *v.stride()[:3],
        layout.page_table.stride(0),
        problem.group,
        problem.scale * math.log2(math.e),
    )


def defines(problem: AttentionProblem) -> dict[str, jit.Define]:
    return {
        "scalar_t": jit.SCALAR[problem.dtype],
        "HEAD_DIM": problem.head_dim,
        "PAGE_SIZE": problem.page_size,
    }


def example(head_dim: int) -> AttentionProblem:
    """Of the kind that is compiled ahead."""
    return AttentionProblem(1, 1, 1, 4, 1, head_dim, layout=Paged(None, None), page_size=16)
