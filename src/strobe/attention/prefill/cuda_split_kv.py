"""FlashAttention with the keys split over blocks: partial results, then their exact merge."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import torch

from strobe.attention import dense
from strobe.attention.problem import AttentionProblem
from strobe.cuda import jit
from strobe.device import gpu

IDEA = "keys split over blocks, (O, m, l) in a workspace, then a merge: a few queries still fill the GPU"

_SOURCE = Path(__file__).with_suffix(".cu")
_DTYPES = ("float16", "bfloat16")
_HEAD_DIM_MAX = 128
_SPLITS_MAX = 64
_BLOCKS_PER_SM = 2
_MERGE_THREADS = 128


@dataclass(frozen=True)
class Tile:
    """A block's queries, 16 a warp, the keys it takes at a time, and the parts all keys are split into."""

    q: int = 64
    k: int = 64
    splits: int | None = None
    """None: enough to fill the GPU."""


DEFAULT = Tile()


class _Workspace(ctypes.Structure):
    """`Workspace` of cuda_split_kv.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("out", "maximum", "sum")),
        *((name, ctypes.c_int) for name in ("splits", "keys")),
        ("rows", ctypes.c_longlong),
    ]


def footprint(head_dim: int, tile: Tile) -> dense.Footprint:
    return dense.Footprint(2 * tile.q, 2 * max(tile.q, 2 * tile.k) * (head_dim + 8))


def refusals(problem: AttentionProblem) -> list[str]:
    reasons = dense.refusals(problem, _DTYPES)
    if problem.head_dim % 16 or problem.head_dim > _HEAD_DIM_MAX:
        reasons.append(f"head_dim {problem.head_dim}; supported: multiples of 16 up to {_HEAD_DIM_MAX}")
    return reasons or refusals_for_tile(problem, DEFAULT)


def refusals_for_tile(problem: AttentionProblem, tile: Tile) -> list[str]:
    reasons = []
    if tile.q < 16 or tile.q % 16:
        reasons.append(f"tile q={tile.q}; supported: multiples of 16")
    if tile.k % 16 or not 16 <= tile.k <= 128:
        reasons.append(f"tile k={tile.k}; supported: multiples of 16 up to 128")
    if tile.splits is not None and not 1 <= tile.splits <= _SPLITS_MAX:
        reasons.append(f"tile splits={tile.splits}; supported: 1 to {_SPLITS_MAX}")
    return reasons or dense.refusals_of(footprint(problem.head_dim, tile), problem)


def run(
    problem: AttentionProblem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    tile: Tile = DEFAULT,
) -> None:
    q, k, v = dense.aligned(q), dense.aligned(k), dense.aligned(v)
    device, rows = q.get_device(), problem.batch * problem.q_heads * problem.q_len
    q_tiles, k_tiles = -(-problem.q_len // tile.q), -(-problem.kv_len // tile.k)
    wanted = tile.splits or _splits(q_tiles * problem.q_heads * problem.batch, gpu(device).sm_count)
    tiles_each = max(1, -(-k_tiles // wanted))
    splits = max(1, -(-k_tiles // tiles_each))
    parts = 0 if splits == 1 else splits
    partial_out = q.new_empty((parts, rows, problem.head_dim), dtype=torch.float32)
    maximum, total = q.new_empty((2, parts, rows), dtype=torch.float32)
    addresses = (partial_out.data_ptr(), maximum.data_ptr(), total.data_ptr())
    workspace = _Workspace(*addresses, splits, tiles_each * tile.k, rows)
    call = dense.params(problem, q, k, v, out, lse)
    defines = dense.defines(problem.dtype, problem.head_dim, tile)
    size = footprint(problem.head_dim, tile)
    grid = (q_tiles * splits, problem.q_heads, problem.batch)
    partials = jit.kernel(_SOURCE, "partials", defines, device)
    partials(grid, size.threads, [call, workspace], shared_bytes=size.shared_bytes)
    if not parts:
        return
    merge = jit.kernel(_SOURCE, "merge", defines, device)
    merge(-(-rows // (_MERGE_THREADS // 32)), _MERGE_THREADS, [call, workspace])


def sources(arch: str) -> list[jit.Source]:
    return [jit.Source(_SOURCE, dense.defines("bfloat16", head_dim, DEFAULT)) for head_dim in (64, 128)]


def _splits(blocks: int, sms: int) -> int:
    """Ways to split the keys so that `blocks` become enough to fill the SMs."""
    return min(_SPLITS_MAX, max(1, _BLOCKS_PER_SM * sms // blocks))
