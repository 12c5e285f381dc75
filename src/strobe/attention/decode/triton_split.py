"""Flash-Decoding over a paged cache in Triton: a group shares each read, the keys are split over programs."""

from __future__ import annotations

import math
from ctypes import c_float, c_int32
from typing import cast

import torch

from strobe.attention import one_query, triton
from strobe.attention.problem import AttentionProblem, Paged
from strobe.attention.triton_launch import Kernel, Stride, bind
from strobe.device import gpu

IDEA = "Triton: a key head's whole group of queries on tensor cores, keys split over programs, then a merge"

_PARTIALS, _MERGE = (Kernel(f"{__name__}_kernel", entry) for entry in ("partials", "merge"))
_TILE_ELEMENTS = 8192
"""Of a tile of keys: 64 keys at head_dim 128, 16 KiB."""
_STAGES = 5
"""Of the pipeline. Page numbers take some: this many leave two tiles of K and of V, with 3 or 4 only one."""
_PROGRAMS_PER_SM = 3
"""As many as fit: 72 KiB of shared memory each."""
_SPLITS_MAX = 128


def refusals(problem: AttentionProblem) -> list[str]:
    reasons = triton.refusals(problem) + one_query.refusals(problem)
    if problem.head_dim & (problem.head_dim - 1):
        reasons.append(f"head_dim {problem.head_dim}; supported: powers of two")
    if problem.group > 64:
        reasons.append(f"{problem.group} query heads a key head; supported: up to 64")
    return reasons


def run(
    problem: AttentionProblem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    layout, rows = cast(Paged, problem.layout), problem.batch * problem.q_heads
    sms = gpu(q.get_device()).sm_count if problem.device == "cuda" else 1
    splits = _splits(problem, _PROGRAMS_PER_SM * sms)
    o = torch.empty((rows, splits, problem.head_dim), dtype=torch.float32, device=q.device)
    m, total = torch.empty((2, rows, splits), dtype=torch.float32, device=q.device)
    strides = q.stride(0), q.stride(2), *k.stride()[:3], *v.stride()[:3], layout.page_table.stride(0)
    arguments = (
        *(q, k, v, o, m, total, layout.seq_lens, layout.page_table),
        *map(Stride, strides),
        c_float(problem.scale * math.log2(math.e)),
    )
    constants = {
        "HEAD_DIM": problem.head_dim,
        "GROUP": problem.group,
        "ROWS": max(16, 1 << (problem.group - 1).bit_length()),
        "PAGE_SIZE": problem.page_size,
        "TILE": _tile(problem),
    }
    bind(_PARTIALS, (splits, problem.kv_heads, problem.batch), arguments, constants, stages=_STAGES)()
    merged = (
        *(o, m, total, out, out if lse is None else lse),
        *map(Stride, (out.stride(0), out.stride(2))),
        c_int32(splits),
    )
    constants = {
        "HEAD_DIM": problem.head_dim,
        "SPLITS": 1 << (splits - 1).bit_length(),
        "WITH_LSE": lse is not None,
    }
    bind(_MERGE, (problem.q_heads, problem.batch), merged, constants)()


def _splits(problem: AttentionProblem, programs: int) -> int:
    """Ways to split the keys so that key heads and rows become `programs`, a tile each at least."""
    wanted = -(-programs // (problem.batch * problem.kv_heads))
    return max(1, min(wanted, -(-problem.kv_len // _tile(problem)), _SPLITS_MAX))


def _tile(problem: AttentionProblem) -> int:
    """Keys at a time."""
    return _TILE_ELEMENTS // problem.head_dim
