"""Attention in four kernels, the whole score matrix in memory: what every later rung improves on."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import torch

from strobe.attention import dense
from strobe.attention.problem import AttentionProblem
from strobe.cuda import jit

IDEA = "four kernels: QKᵀ, scale and mask, softmax, PV; the score matrix goes through memory between them"

_SOURCE = Path(__file__).with_suffix(".cu")
_ROW_THREADS = 256


@dataclass(frozen=True)
class Tile:
    """A block of the two products computes `edge` x `edge` results, one a thread."""

    edge: int = 32


DEFAULT = Tile()


def refusals(problem: AttentionProblem) -> list[str]:
    return dense.refusals(problem) or refusals_for_tile(problem, DEFAULT)


def refusals_for_tile(problem: AttentionProblem, tile: Tile) -> list[str]:
    if tile.edge not in (8, 16, 32):
        return [f"tile edge {tile.edge}; supported: 8, 16, 32"]
    return []


def run(
    problem: AttentionProblem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    tile: Tile = DEFAULT,
) -> None:
    call = dense.params(problem, q, k, v, out, lse)
    rows = problem.batch * problem.q_heads
    s = q.new_empty((rows, problem.q_len, problem.kv_len), dtype=torch.float32)
    if problem.kv_len:
        scores(problem, call, s, tile)
        scale_and_mask(problem, call, s, tile)
    softmax_rows(problem, s, lse, tile)
    weigh_values(problem, call, s, tile)


def scores(problem: AttentionProblem, call: dense.DenseParams, s: torch.Tensor, tile: Tile = DEFAULT) -> None:
    """Fill `s [batch x q_heads, q_len, kv_len]` float32 with QKᵀ, unscaled (docs/math.md, eq. 1)."""
    grid = (_tiles(problem.kv_len, tile), _tiles(problem.q_len, tile), s.shape[0])
    _kernel(problem, "scores", s, tile)(grid, (tile.edge, tile.edge), [call, s])


def scale_and_mask(
    problem: AttentionProblem, call: dense.DenseParams, s: torch.Tensor, tile: Tile = DEFAULT
) -> None:
    """Scale `s` and set what is not seen to -inf, in place (eq. 1)."""
    blocks = min(-(-s.numel() // _ROW_THREADS), 1 << 16)
    arguments = [call, s, ctypes.c_longlong(s.numel())]
    _kernel(problem, "scale_and_mask", s, tile)(blocks, _ROW_THREADS, arguments)


def softmax_rows(
    problem: AttentionProblem, s: torch.Tensor, lse: torch.Tensor | None, tile: Tile = DEFAULT
) -> None:
    """Softmax of each row of `s`, in place; `lse [batch, q_heads, q_len]` its log-sum-exp (eq. 2)."""
    arguments = [s, lse, ctypes.c_int(s.shape[2])]
    _kernel(problem, "softmax_rows", s, tile)(s.shape[0] * s.shape[1], _ROW_THREADS, arguments)


def weigh_values(
    problem: AttentionProblem, call: dense.DenseParams, s: torch.Tensor, tile: Tile = DEFAULT
) -> None:
    """The call's out from the weights `s` and its values (eq. 3)."""
    grid = (_tiles(problem.head_dim, tile), _tiles(problem.q_len, tile), s.shape[0])
    _kernel(problem, "weigh_values", s, tile)(grid, (tile.edge, tile.edge), [call, s])


def sources(arch: str) -> list[jit.Source]:
    return [jit.Source(_SOURCE, _defines(dtype, 128, DEFAULT)) for dtype in ("bfloat16", "float32")]


def _kernel(problem: AttentionProblem, entry: str, s: torch.Tensor, tile: Tile) -> jit.Kernel:
    return jit.kernel(_SOURCE, entry, _defines(problem.dtype, problem.head_dim, tile), s.get_device())


def _defines(dtype: str, head_dim: int, tile: Tile) -> dict[str, jit.Define]:
    return {"scalar_t": jit.SCALAR[dtype], "HEAD_DIM": head_dim, "EDGE": tile.edge}


def _tiles(length: int, tile: Tile) -> int:
    return -(-length // tile.edge)
