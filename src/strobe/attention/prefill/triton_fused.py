"""FlashAttention-2 in Triton: the compiler places the copies, the shared memory and the tensor cores."""

from __future__ import annotations

import math
from collections.abc import Callable
from ctypes import c_float, c_int32
from functools import partial

import torch

from strobe.attention import dense, triton, triton_tuned
from strobe.attention.problem import UNLIMITED, AttentionProblem, Packed, Paged
from strobe.attention.triton_launch import Kernel, LongStride, Rows, bind
from strobe.attention.triton_tuned import Config
from strobe.device import Gpu, gpu

IDEA = "one kernel of Triton tiles: the compiler does what the CUDA rungs do by hand"

_DTYPES = ("float16", "bfloat16")
_HEAD_DIMS = (32, 64, 128, 256)
_LONG = 2048
"""Keys from which a problem is tuned as a long one."""
_KERNEL = Kernel(f"{__name__}_kernel", "attend")

HOPPER = (
    Config(64, 64, 4, 3),
    Config(64, 128, 4, 2),
    Config(128, 128, 8, 3),
    Config(128, 64, 8, 2),
    Config(64, 32, 4, 2),
)
"""The first two that fit are timed at the first call of each kind: compiling one takes 0.5 to 1 s. On an H200
the first wins at head_dim 128, the second at 64."""
OTHERS = (Config(128, 64, 8, 2), Config(128, 32, 8, 2), Config(64, 32, 4, 2))
"""Where products read registers alone, Hopper's first two spill hundreds of bytes."""
_INTERPRETED = Config(32, 32, 4, 1)


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
    if not k.numel():
        out.zero_()
        if lse is not None:
            lse.fill_(-math.inf)
        return
    call = partial(_prepare, problem, [_as_rows(tensor) for tensor in (q, k, v)], out, lse)
    if problem.device == "cpu":
        call(_INTERPRETED)()
        return
    device = out.get_device()
    kind = f"head_dim {problem.head_dim}, {'causal' if problem.window[1] == 0 else 'full'}"
    if problem.kv_len >= _LONG:
        kind += ", long"
    call(triton_tuned.choose(_KERNEL, kind, fitting(problem.head_dim, gpu(device)), call, device))()


def fitting(head_dim: int, device: Gpu) -> list[Config]:
    """Two configurations whose tiles of 16-bit elements fit a device's shared memory."""
    room = device.shared_memory_per_block // (2 * head_dim)
    configs = HOPPER if device.arch // 10 == 9 else OTHERS
    return [each for each in configs if each.q_tile + 2 * each.stages * each.k_tile <= room][:2]


def _prepare(
    problem: AttentionProblem,
    rows: list[torch.Tensor],
    out: torch.Tensor,
    lse: torch.Tensor | None,
    config: Config,
) -> Callable[[], None]:
    tiles = (config.q_tile, config.k_tile, config.k_tile)
    sums = (out, out)
    if packed := isinstance(problem.layout, Packed):
        sums = problem.layout.cu_seqlens_q, problem.layout.cu_seqlens_kv
    strides = (
        0 if packed else out.stride(0),
        out.stride(-3),
        out.stride(-2),
        0 if packed or lse is None else lse.stride(0),
        0 if lse is None else lse.stride(-2),
    )
    arguments = (
        *(Rows(tensor, (tile, problem.head_dim)) for tensor, tile in zip(rows, tiles, strict=True)),
        *(out, out if lse is None else lse, *sums),
        *map(c_int32, (problem.q_len, problem.kv_len, problem.q_heads)),
        *map(LongStride, strides),
        c_float(problem.scale * math.log2(math.e)),
    )
    constants = {
        "HEAD_DIM": problem.head_dim,
        "GROUP": problem.group,
        "CAUSAL": problem.window[1] == 0,
        "PACKED": packed,
        "WITH_LSE": lse is not None,
        "Q_TILE": config.q_tile,
        "K_TILE": config.k_tile,
    }
    grid = -(-problem.q_len // config.q_tile), problem.batch * problem.q_heads
    return bind(_KERNEL, grid, arguments, constants, warps=config.warps, stages=config.stages)


def _as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """`[(batch,) length, heads, dim]` as `[rows, heads x dim]`: a view where the strides allow it."""
    *leading, heads, dim = tensor.shape
    rows = tensor.flatten(-2) if tensor.stride(-2) == dim else tensor.reshape(*leading, heads * dim)
    rows = rows.flatten(0, 1) if rows.dim() == 3 else rows
    odd = rows.stride(0) * rows.element_size() % 16 or rows.data_ptr() % 16
    return rows.clone(memory_format=torch.contiguous_format) if odd else rows
