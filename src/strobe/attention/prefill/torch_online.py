"""FlashAttention-2's forward pass, tile by tile, in plain PyTorch.

Source: Dao 2023 (arXiv 2307.08691), Algorithm 1. All heads of a row go through a tile together.
"""

from __future__ import annotations

import numpy as np
import torch

from strobe.attention.problem import AttentionProblem
from strobe.attention.rows import Row, rows_of

DIFFERENTIABLE = True
IDEA = "keys in tiles, a running maximum, sum and accumulator: no score matrix"
Q_TILE, K_TILE = 128, 128


def refusals(problem: AttentionProblem) -> list[str]:
    return []


def run(
    problem: AttentionProblem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    dtype = _working(q)
    for row in rows_of(problem, q, k, v):
        row_out = q.new_empty((problem.q_heads, len(row.q), problem.head_dim), dtype=dtype)
        row_lse = q.new_empty((problem.q_heads, len(row.q)), dtype=dtype)
        for start in range(0, len(row.q), Q_TILE):
            tile = slice(start, start + Q_TILE)
            row_out[:, tile], row_lse[:, tile] = _query_tile(problem, row, tile)
        row.write(out, row_out)
        if lse is not None:
            row.write_lse(lse, row_lse)


def _query_tile(problem: AttentionProblem, row: Row, tile: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """docs/math.md, equation 5: `out [q_heads, q_tile, head_dim]` and `lse [q_heads, q_tile]`."""
    q_len, kv_len = len(row.q), len(row.k)
    first, end = problem.key_range(q_len, kv_len)
    # [kv_heads, group, q_tile, head_dim]
    dtype = _working(row.q)
    q = row.q[tile].to(dtype).transpose(0, 1).unflatten(0, (problem.kv_heads, problem.group))
    accumulator = torch.zeros_like(q)
    highest = q.new_full(q.shape[:-1], float("-inf"))
    total = q.new_zeros(q.shape[:-1])
    if problem.sinks is not None:
        highest = problem.sinks.to(dtype).view(problem.kv_heads, problem.group, 1).expand_as(total).clone()
        total = torch.ones_like(total)
    for start in range(max(0, int(first[tile].min())), min(kv_len, int(end[tile].max())), K_TILE):
        keys = slice(start, min(start + K_TILE, kv_len))
        k = row.k[keys].to(dtype).transpose(0, 1).unsqueeze(1)
        v = row.v[keys].to(dtype).transpose(0, 1).unsqueeze(1)
        scores = q @ k.transpose(-1, -2) * problem.scale
        if problem.softcap:
            scores = problem.softcap * torch.tanh(scores / problem.softcap)
        if problem.masked:
            scores = scores.masked_fill(~_visible(first[tile], end[tile], keys, q.device), float("-inf"))
        new_highest = torch.maximum(highest, scores.amax(dim=-1))
        # nothing seen yet: -inf - -inf has no value, and every weight is 0 against any finite shift
        shift = new_highest.masked_fill(new_highest == float("-inf"), 0.0)
        rescale = torch.exp(highest - shift)
        weights = torch.exp(scores - shift.unsqueeze(-1))
        total = total * rescale + weights.sum(dim=-1)
        accumulator = accumulator * rescale.unsqueeze(-1) + weights @ v
        highest = new_highest
    out = accumulator / total.masked_fill(total == 0, 1.0).unsqueeze(-1)
    return out.flatten(0, 1), (highest + torch.log(total)).flatten(0, 1)


def _working(q: torch.Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _visible(first: np.ndarray, end: np.ndarray, keys: slice, device: torch.device) -> torch.Tensor:
    """bool `[q_tile, k_tile]`."""
    key = torch.arange(keys.start, keys.stop, device=device)
    first_key, end_key = (torch.as_tensor(bound, device=device).unsqueeze(1) for bound in (first, end))
    return (key >= first_key) & (key < end_key)
