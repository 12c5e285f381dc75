"""FlashAttention with head_dim in tiles: 256, 512 and 1024 run in under 48 KiB of shared memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from strobe.attention import dense
from strobe.attention.problem import AttentionProblem
from strobe.cuda import jit

IDEA = "head_dim in tiles, the output in a block's registers: up to 1024 in 48 KiB of shared memory"

_SOURCE = Path(__file__).with_suffix(".cu")
_DTYPES = ("float16", "bfloat16")
_HEAD_DIM_MAX = 1024
_SHARED_MAX = 48 * 1024


@dataclass(frozen=True)
class Tile:
    """Keys at a time, and columns of head_dim at a time: of Q and K for the scores, of V for the output."""

    k: int = 64
    qk: int = 64
    pv: int | None = None
    """None: 128 where head_dim is a multiple of it, else 64."""

    def columns(self, head_dim: int) -> int:
        return self.pv or (64 if head_dim % 128 else 128)


DEFAULT = Tile()


def warps(head_dim: int) -> int:
    """Of a block. Four of few registers leave room for other blocks, which work while this one loads."""
    return 4 if head_dim <= 128 else 8


def across(head_dim: int) -> int:
    """Warps side by side over the columns of the output."""
    return 1 if head_dim <= 256 else 2 if head_dim <= 512 else 4


def footprint(head_dim: int, tile: Tile) -> dense.Footprint:
    q = 16 * warps(head_dim) // across(head_dim)
    loaded = max((q + tile.k) * (tile.qk + 8), tile.k * (tile.columns(head_dim) + 8))
    shared_bytes = 2 * loaded + 2 * q * (tile.k + 8) + 4 * q * across(head_dim)
    return dense.Footprint(32 * warps(head_dim), shared_bytes)


def refusals(problem: AttentionProblem) -> list[str]:
    reasons = dense.refusals(problem, _DTYPES)
    if problem.head_dim % 64 or problem.head_dim > _HEAD_DIM_MAX:
        reasons.append(f"head_dim {problem.head_dim}; supported: multiples of 64 up to {_HEAD_DIM_MAX}")
    return reasons or refusals_for_tile(problem, DEFAULT)


def refusals_for_tile(problem: AttentionProblem, tile: Tile) -> list[str]:
    step = 16 * across(problem.head_dim)
    reasons = []
    if tile.k < step or tile.k % step:
        reasons.append(f"tile k={tile.k}; supported at head_dim {problem.head_dim}: multiples of {step}")
    if tile.qk < 16 or tile.qk % 16 or problem.head_dim % tile.qk:
        reasons.append(f"tile qk={tile.qk}; supported: multiples of 16 that divide head_dim")
    columns = tile.columns(problem.head_dim)
    if columns < step or columns % step or problem.head_dim % columns:
        reasons.append(f"tile pv={columns}; supported: multiples of {step} that divide head_dim")
    taken = footprint(problem.head_dim, tile).shared_bytes
    if taken > _SHARED_MAX:
        reasons.append(f"its block takes {taken} B of shared memory; supported: up to {_SHARED_MAX}")
    return reasons


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
    attend = jit.kernel(_SOURCE, "attend", _defines(problem.dtype, problem.head_dim, tile), q.get_device())
    block = warps(problem.head_dim)
    q_tile = 16 * block // across(problem.head_dim)
    grid = (-(-problem.q_len // q_tile), problem.q_heads, problem.batch)
    attend(grid, 32 * block, dense.params(problem, q, k, v, out, lse))


def sources(arch: str) -> list[jit.Source]:
    dims = (64, 128, 256, 512, 1024)
    return [jit.Source(_SOURCE, _defines("bfloat16", head_dim, DEFAULT)) for head_dim in dims]


def _defines(dtype: str, head_dim: int, tile: Tile) -> dict[str, jit.Define]:
    return {
        "scalar_t": jit.SCALAR[dtype],
        "HEAD_DIM": head_dim,
        "K_TILE": tile.k,
        "QK_TILE": tile.qk,
        "PV_TILE": tile.columns(head_dim),
    }
