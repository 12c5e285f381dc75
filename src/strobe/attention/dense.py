"""What the CUDA rungs on dense tensors share: the kernel's parameter, and what none of them runs."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from strobe.attention.problem import UNLIMITED, AttentionProblem, Dense
from strobe.cuda import jit, needs

_SHARED_KIB = {75: 64, 80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227}
"""Most KiB of shared memory a block may take, by arch; 99 where an arch is not listed."""
_THREADS_MAX = 1024
GRID_MAX = 65535
"""The most blocks in a grid's second and third dimension."""
captured: dict[Any, Any] = {}
"""What rungs keep of dense calls while a CUDA graph is captured, in the graph's memory: as `Paged.scratch`,
which such calls lack, of one graph at a time."""


class Strides(ctypes.Structure):
    """In elements, of a `[batch, row, head, dim]` tensor."""

    _fields_ = [(name, ctypes.c_longlong) for name in ("batch", "row", "head")]


class DenseParams(ctypes.Structure):
    """`DenseParams` of dense.cuh."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "out", "lse")),
        *((name, Strides) for name in ("q_strides", "k_strides", "v_strides", "out_strides")),
        *((name, ctypes.c_int) for name in ("q_len", "kv_len", "q_heads", "group", "causal")),
        ("scale_log2e", ctypes.c_float),
    ]


class Tile(Protocol):
    """A block's queries, and the keys it takes at a time."""

    @property
    def q(self) -> int: ...
    @property
    def k(self) -> int: ...


@dataclass(frozen=True)
class Footprint:
    """What one block of a tiling takes."""

    threads: int
    shared_bytes: int


def params(
    problem: AttentionProblem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> DenseParams:
    """The kernel's parameter for tensors `[batch, length, heads, head_dim]`."""
    return DenseParams(
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        out.data_ptr(),
        None if lse is None else lse.data_ptr(),
        *(Strides(*tensor.stride()[:3]) for tensor in (q, k, v, out)),
        problem.q_len,
        problem.kv_len,
        problem.q_heads,
        problem.group,
        problem.window[1] == 0,
        problem.scale * math.log2(math.e),
    )


def defines(dtype: str, head_dim: int, tile: Tile) -> dict[str, jit.Define]:
    """What a kernel of these tiles is compiled with."""
    return {"scalar_t": jit.SCALAR[dtype], "HEAD_DIM": head_dim, "Q_TILE": tile.q, "K_TILE": tile.k}


def attend(
    source: Path, problem: AttentionProblem, tile: Tile, size: Footprint, call: DenseParams, device: int
) -> None:
    """Run the kernel `attend` of a source: a block for each tile of queries of each head."""
    kernel = jit.kernel(source, "attend", defines(problem.dtype, problem.head_dim, tile), device)
    grid = (-(-problem.q_len // tile.q), problem.q_heads, problem.batch)
    kernel(grid, size.threads, call, shared_bytes=size.shared_bytes)


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where every row starts at a multiple of 16 bytes, else a copy that does."""
    elements = 16 // tensor.element_size()
    odd = any(
        stride % elements
        for size, stride in zip(tensor.shape, tensor.stride()[:-1], strict=False)
        if size > 1
    )
    if odd or tensor.data_ptr() % 16:
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor


def refusals(problem: AttentionProblem, dtypes: tuple[str, ...] = tuple(jit.SCALAR)) -> list[str]:
    """What the teaching kernels leave to the production rungs, each by name."""
    reasons = needs.refusals(problem.device, problem.arch)
    if not isinstance(problem.layout, Dense):
        reasons.append(f"layout {type(problem.layout).__name__}; supported: Dense")
    if problem.dtype not in dtypes:
        reasons.append(f"dtype {problem.dtype}; supported: {', '.join(dtypes)}")
    elif problem.kv_dtype != problem.dtype:
        reasons.append(f"k and v in {problem.kv_dtype}; supported: q's dtype")
    if problem.window not in ((UNLIMITED, UNLIMITED), (UNLIMITED, 0)):
        reasons.append(f"window {problem.window}; supported: none, or causal")
    if problem.softcap:
        reasons.append("softcap; supported: none")
    if problem.sinks is not None:
        reasons.append("sinks; supported: none")
    if problem.batch * problem.q_heads > GRID_MAX:
        reasons.append(f"batch x q_heads {problem.batch * problem.q_heads}; supported: up to {GRID_MAX}")
    return reasons


def shared_memory(arch: int) -> int:
    """Most bytes of shared memory a block may take; an SM has 1 KiB more, which it keeps for each block."""
    return 1024 * _SHARED_KIB.get(arch, 99)


def refusals_of(footprint: Footprint, problem: AttentionProblem) -> list[str]:
    """Why a block of this size cannot be on the problem's GPU; nothing where that is none."""
    most = shared_memory(problem.arch)
    reasons = []
    if problem.arch and footprint.shared_bytes > most:
        reasons.append(f"its block takes {footprint.shared_bytes} B of shared memory; this GPU has {most}")
    if footprint.threads > _THREADS_MAX:
        reasons.append(f"its block takes {footprint.threads} threads; supported: up to {_THREADS_MAX}")
    return reasons
