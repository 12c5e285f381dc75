"""FlashAttention-1 with a warp a group of queries: each value read from shared memory serves several."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from strobe.attention import dense
from strobe.attention.problem import AttentionProblem
from strobe.cuda import jit

IDEA = "a warp a group of queries: lanes share what they read, outputs in registers, 16-byte loads"

_SOURCE = Path(__file__).with_suffix(".cu")
_HEAD_DIM_MAX = 256


@dataclass(frozen=True)
class Tile:
    """A block's queries, a quarter of them a warp's, and the keys it takes at a time."""

    q: int = 64
    k: int = 32


DEFAULT = Tile()
_THREADS = 128


def footprint(head_dim: int, tile: Tile) -> dense.Footprint:
    floats = (tile.q + tile.k) * (head_dim + 4) + tile.k * head_dim + tile.k * tile.q
    return dense.Footprint(_THREADS, 4 * floats)


def refusals(problem: AttentionProblem) -> list[str]:
    reasons = dense.refusals(problem)
    if problem.head_dim % 32 or problem.head_dim > _HEAD_DIM_MAX:
        reasons.append(f"head_dim {problem.head_dim}; supported: multiples of 32 up to {_HEAD_DIM_MAX}")
    return reasons or refusals_for_tile(problem, DEFAULT)


def refusals_for_tile(problem: AttentionProblem, tile: Tile) -> list[str]:
    reasons = []
    if tile.q not in (64, 128):
        reasons.append(f"tile q={tile.q}; supported: 64, 128")
    if tile.k not in (8, 16, 32, 64):
        reasons.append(f"tile k={tile.k}; supported: 8, 16, 32, 64")
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
    call = dense.params(problem, q, k, v, out, lse)
    dense.attend(_SOURCE, problem, tile, footprint(problem.head_dim, tile), call, q.get_device())


def sources(arch: str) -> list[jit.Source]:
    return [jit.Source(_SOURCE, dense.defines(dtype, 128, DEFAULT)) for dtype in ("bfloat16", "float32")]
