"""FlashAttention-1 in one kernel: a thread a query, keys and values through shared memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from strobe.attention import dense
from strobe.attention.problem import AttentionProblem
from strobe.cuda import jit

IDEA = "one kernel, a thread a query: online softmax in registers, no score matrix in memory"

_SOURCE = Path(__file__).with_suffix(".cu")
_HEAD_DIM_MAX = 128  # a thread holds its whole output row in registers


@dataclass(frozen=True)
class Tile:
    """A block's queries, one a thread, and the keys it takes at a time."""

    q: int = 128
    k: int = 16


DEFAULT = Tile()


def footprint(head_dim: int, tile: Tile) -> dense.Footprint:
    floats = 2 * tile.k * head_dim + head_dim * (tile.q + 1)
    return dense.Footprint(tile.q, 4 * floats)


def refusals(problem: AttentionProblem) -> list[str]:
    reasons = dense.refusals(problem)
    if problem.head_dim % 8 or problem.head_dim > _HEAD_DIM_MAX:
        reasons.append(f"head_dim {problem.head_dim}; supported: multiples of 8 up to {_HEAD_DIM_MAX}")
    return reasons or refusals_for_tile(problem, DEFAULT)


def refusals_for_tile(problem: AttentionProblem, tile: Tile) -> list[str]:
    reasons = []
    if tile.q < 32 or tile.q % 32:
        reasons.append(f"tile q={tile.q}; supported: multiples of 32")
    if not 1 <= tile.k <= 64:
        reasons.append(f"tile k={tile.k}; supported: 1 to 64, a thread holds that many scores")
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
    k, v = dense.aligned(k), dense.aligned(v)
    call = dense.params(problem, q, k, v, out, lse)
    dense.attend(_SOURCE, problem, tile, footprint(problem.head_dim, tile), call, q.get_device())


def sources(arch: str) -> list[jit.Source]:
    return [jit.Source(_SOURCE, dense.defines(dtype, 128, DEFAULT)) for dtype in ("bfloat16", "float32")]
