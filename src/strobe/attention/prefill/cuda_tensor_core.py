"""FlashAttention on tensor cores: mma.sync for both products, the weights never leave registers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from strobe.attention import dense
from strobe.attention.problem import AttentionProblem
from strobe.cuda import jit

IDEA = "both products on tensor cores (mma.sync); weights go from one to the other in registers"

_SOURCE = Path(__file__).with_suffix(".cu")
_DTYPES = ("float16", "bfloat16")
_HEAD_DIM_MAX = 128  # queries, scores and output of a warp fill its registers


@dataclass(frozen=True)
class Tile:
    """A block's queries, 16 a warp, and the keys it takes at a time."""

    q: int = 64
    k: int = 64


DEFAULT = Tile()


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
    return [jit.Source(_SOURCE, dense.defines("bfloat16", head_dim, DEFAULT)) for head_dim in (64, 128)]
