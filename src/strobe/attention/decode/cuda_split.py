"""Flash-Decoding: a row's keys split over blocks, then a merge (docs/math.md, eq. 6)."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from strobe.attention import dense, one_query
from strobe.attention.problem import AttentionProblem
from strobe.cuda import jit
from strobe.device import gpu

IDEA = "a row's keys split over blocks, (o, m, l) in a workspace, then a merge: one row fills the GPU"

_SOURCE = Path(__file__).with_suffix(".cu")
_THREADS = 128
_BLOCKS_PER_SM = 8
_KEYS_MIN = 128
"""Keys that a split has at least: for fewer the merge costs more than the split saves."""

refusals = one_query.cuda_refusals


def run(
    problem: AttentionProblem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    q, k, v = dense.aligned(q), dense.aligned(k), dense.aligned(v)
    device, rows = q.get_device(), problem.batch * problem.q_heads
    wanted = -(-_BLOCKS_PER_SM * gpu(device).sm_count // rows)
    splits = max(1, min(wanted, problem.kv_len // _KEYS_MIN))
    o = q.new_empty((rows, splits, problem.head_dim), dtype=torch.float32)
    m, total = q.new_empty((2, rows, splits), dtype=torch.float32)
    workspace = (ctypes.c_void_p * 3)(o.data_ptr(), m.data_ptr(), total.data_ptr())
    call, defines = one_query.params(problem, q, k, v, out, lse), one_query.defines(problem)
    partials = jit.kernel(_SOURCE, "partials", defines, device)
    partials((splits, problem.q_heads, problem.batch), _THREADS, [call, workspace])
    merge = jit.kernel(_SOURCE, "merge", defines, device)
    merge((problem.q_heads, problem.batch), problem.head_dim, [call, workspace, ctypes.c_int(splits)])


def sources(arch: str) -> list[jit.Source]:
    return [jit.Source(_SOURCE, one_query.defines(one_query.example(dim))) for dim in (64, 128)]
