"""FlashAttention's loop in NumPy, and its march toward a GPU in five stages.

Every stage computes one head exactly (docs/math.md, equation 5; Dao et al. 2022, arXiv 2205.14135,
Algorithm 1, with the division moved to the end). Each goes one step closer to a kernel, and counts
the bytes of the arrays that it asks for (what NumPy makes and frees within an expression is not among them):

1. `tiles`               loops over tiles of queries and keys; NumPy works on whole tiles.
2. `blocks_and_threads`  a block owns a tile of queries, a thread one query; K and V tiles are staged.
3. `flat_memory`         the same with 1-D arrays and index arithmetic, as a pointer sees them.
4. `reused_buffers`      what a block needs is allocated once and used by every block after it.
5. `fused_in_place`      no tile of scores: a score is used when it is made, and the output
                         accumulates where it will stay.

The rung runs stage 1. Stages 2 to 5 loop over numbers in Python and are for small inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from strobe.attention.oracle import visible
from strobe.attention.problem import AttentionProblem
from strobe.attention.rows import numpy_heads, numpy_refusals

IDEA = "the keys in tiles with a running maximum and sum: memory linear in the length"
Q_TILE, K_TILE = 64, 64


def refusals(problem: AttentionProblem) -> list[str]:
    return numpy_refusals(problem)


def run(problem: AttentionProblem, q: Any, k: Any, v: Any, out: Any, lse: Any) -> None:
    for head in numpy_heads(problem, q, k, v):
        mask = visible(problem, len(head.q), len(head.k)) if problem.masked else None
        result = attend(head.q, head.k, head.v, problem.scale, mask)
        head.write(out, lse, result.out, result.lse)


@dataclass(frozen=True, eq=False)
class Result:
    """`out [q_len, head_dim]`, `lse [q_len]`, and the bytes that the stage allocated besides."""

    out: np.ndarray
    lse: np.ndarray
    scratch_bytes: int


class Arena:
    """Hands out float32 arrays and counts their bytes: what a stage takes beyond inputs and outputs."""

    def __init__(self) -> None:
        self.bytes = 0

    def new(self, *shape: int, fill: float = 0.0) -> np.ndarray:
        array = np.full(shape, fill, np.float32)
        self.bytes += array.nbytes
        return array


def attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    scale: float,
    mask: np.ndarray | None = None,
    stage: str = "tiles",
    tile: tuple[int, int] = (Q_TILE, K_TILE),
) -> Result:
    """One head through one stage.

    q `[q_len, head_dim]`, k and v `[kv_len, head_dim]` float32; mask bool `[q_len, kv_len]`, True
    where a query sees a key; tile `(queries, keys)`. Raises KeyError for an unknown stage.
    """
    arena = Arena()
    out = np.zeros_like(q, dtype=np.float32)
    lse = np.full(len(q), -np.inf, np.float32)
    sees = np.ones((len(q), len(k)), bool) if mask is None else mask
    STAGES[stage](_Call(q, k, v, scale, sees, *tile), arena, out, lse)
    return Result(out, lse, arena.bytes)


@dataclass(frozen=True, eq=False)
class _Call:
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    scale: float
    sees: np.ndarray
    q_tile: int
    k_tile: int

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(q_len, kv_len, head_dim)"""
        return len(self.q), len(self.k), self.q.shape[1]


def _tiles(call: _Call, arena: Arena, out: np.ndarray, lse: np.ndarray) -> None:
    q_len, kv_len, head_dim = call.sizes
    for q_at in range(0, q_len, call.q_tile):
        queries = slice(q_at, min(q_at + call.q_tile, q_len))
        rows = queries.stop - queries.start
        highest, total = arena.new(rows, fill=-np.inf), arena.new(rows)
        accumulator = arena.new(rows, head_dim)
        for k_at in range(0, kv_len, call.k_tile):
            keys = slice(k_at, min(k_at + call.k_tile, kv_len))
            scores = arena.new(rows, keys.stop - keys.start)
            scores[:] = np.where(
                call.sees[queries, keys], call.q[queries] @ call.k[keys].T * call.scale, -np.inf
            )
            new_highest = np.maximum(highest, scores.max(axis=1))
            shift = np.where(np.isfinite(new_highest), new_highest, 0)
            rescale = np.exp(highest - shift)
            weights = np.exp(scores - shift[:, None])
            total = total * rescale + weights.sum(axis=1)
            accumulator = accumulator * rescale[:, None] + weights @ call.v[keys]
            highest = new_highest
        seen = total > 0
        out[queries][seen] = accumulator[seen] / total[seen, None]
        lse[queries][seen] = highest[seen] + np.log(total[seen])


def _blocks_and_threads(call: _Call, arena: Arena, out: np.ndarray, lse: np.ndarray) -> None:
    q_len, kv_len, head_dim = call.sizes
    for block in range(-(-q_len // call.q_tile)):
        highest, total = arena.new(call.q_tile, fill=-np.inf), arena.new(call.q_tile)
        accumulator = arena.new(call.q_tile, head_dim)
        for k_at in range(0, kv_len, call.k_tile):
            k_shared, v_shared = arena.new(call.k_tile, head_dim), arena.new(call.k_tile, head_dim)
            keys = min(call.k_tile, kv_len - k_at)
            for thread in range(keys):
                k_shared[thread], v_shared[thread] = call.k[k_at + thread], call.v[k_at + thread]
            for thread in range(min(call.q_tile, q_len - block * call.q_tile)):
                i = block * call.q_tile + thread
                scores = arena.new(call.k_tile)
                for j in range(keys):
                    seen = call.sees[i, k_at + j]
                    scores[j] = call.q[i] @ k_shared[j] * call.scale if seen else -np.inf
                new_highest = max(highest[thread], scores[:keys].max())
                if new_highest == -np.inf:
                    continue
                rescale = np.exp(highest[thread] - new_highest)
                total[thread] *= rescale
                accumulator[thread] *= rescale
                for j in range(keys):
                    weight = np.exp(scores[j] - new_highest)
                    total[thread] += weight
                    accumulator[thread] += weight * v_shared[j]
                highest[thread] = new_highest
        for thread in range(min(call.q_tile, q_len - block * call.q_tile)):
            if total[thread] > 0:
                out[block * call.q_tile + thread] = accumulator[thread] / total[thread]
                lse[block * call.q_tile + thread] = highest[thread] + np.log(total[thread])


def _flat_memory(call: _Call, arena: Arena, out: np.ndarray, lse: np.ndarray) -> None:
    for block in range(-(-len(call.q) // call.q_tile)):
        _flat_block(call, _Buffers(call, arena), block, out.reshape(-1), lse)


def _reused_buffers(call: _Call, arena: Arena, out: np.ndarray, lse: np.ndarray) -> None:
    buffers = _Buffers(call, arena)
    for block in range(-(-len(call.q) // call.q_tile)):
        _flat_block(call, buffers, block, out.reshape(-1), lse)


class _Buffers:
    """A block's flat memory: K and V tiles, scores, and each thread's maximum, sum and accumulator."""

    def __init__(self, call: _Call, arena: Arena) -> None:
        head_dim = call.sizes[2]
        self.k_shared = arena.new(call.k_tile * head_dim)
        self.v_shared = arena.new(call.k_tile * head_dim)
        self.scores = arena.new(call.q_tile * call.k_tile)
        self.highest, self.total = arena.new(call.q_tile), arena.new(call.q_tile)
        self.accumulator = arena.new(call.q_tile * head_dim)


def _flat_block(call: _Call, at: _Buffers, block: int, out: np.ndarray, lse: np.ndarray) -> None:
    q_len, kv_len, head_dim = call.sizes
    q, k, v, sees = call.q.reshape(-1), call.k.reshape(-1), call.v.reshape(-1), call.sees.reshape(-1)
    threads = min(call.q_tile, q_len - block * call.q_tile)
    at.highest[:], at.total[:], at.accumulator[:] = -np.inf, 0, 0
    for k_at in range(0, kv_len, call.k_tile):
        keys = min(call.k_tile, kv_len - k_at)
        for x in range(keys * head_dim):
            at.k_shared[x], at.v_shared[x] = k[k_at * head_dim + x], v[k_at * head_dim + x]
        for thread in range(threads):
            i = block * call.q_tile + thread
            new_highest = at.highest[thread]
            for j in range(keys):
                score = -math.inf
                if sees[i * kv_len + k_at + j]:
                    score = 0.0
                    for d in range(head_dim):
                        score += q[i * head_dim + d] * at.k_shared[j * head_dim + d]
                    score *= call.scale
                at.scores[thread * call.k_tile + j] = score
                new_highest = max(new_highest, score)
            if new_highest == -math.inf:
                continue
            rescale = math.exp(at.highest[thread] - new_highest)
            at.total[thread] *= rescale
            for d in range(head_dim):
                at.accumulator[thread * head_dim + d] *= rescale
            for j in range(keys):
                weight = math.exp(at.scores[thread * call.k_tile + j] - new_highest)
                at.total[thread] += weight
                for d in range(head_dim):
                    at.accumulator[thread * head_dim + d] += weight * at.v_shared[j * head_dim + d]
            at.highest[thread] = new_highest
    for thread in range(threads):
        i = block * call.q_tile + thread
        if at.total[thread] > 0:
            lse[i] = at.highest[thread] + math.log(at.total[thread])
            for d in range(head_dim):
                out[i * head_dim + d] = at.accumulator[thread * head_dim + d] / at.total[thread]


def _fused_in_place(call: _Call, arena: Arena, out: np.ndarray, lse: np.ndarray) -> None:
    q_len, kv_len, head_dim = call.sizes
    q, k, v, sees, out = (x.reshape(-1) for x in (call.q, call.k, call.v, call.sees, out))
    for i in range(q_len):
        highest, total = -math.inf, 0.0
        for j in range(kv_len):
            if not sees[i * kv_len + j]:
                continue
            score = 0.0
            for d in range(head_dim):
                score += q[i * head_dim + d] * k[j * head_dim + d]
            score *= call.scale
            new_highest = max(highest, score)
            rescale, weight = math.exp(highest - new_highest), math.exp(score - new_highest)
            total = total * rescale + weight
            for d in range(head_dim):
                out[i * head_dim + d] = out[i * head_dim + d] * rescale + weight * v[j * head_dim + d]
            highest = new_highest
        if total > 0:
            lse[i] = highest + math.log(total)
            for d in range(head_dim):
                out[i * head_dim + d] /= total


STAGES: dict[str, Callable[[_Call, Arena, np.ndarray, np.ndarray], None]] = {
    "tiles": _tiles,
    "blocks_and_threads": _blocks_and_threads,
    "flat_memory": _flat_memory,
    "reused_buffers": _reused_buffers,
    "fused_in_place": _fused_in_place,
}
"""In the order of the lesson."""
