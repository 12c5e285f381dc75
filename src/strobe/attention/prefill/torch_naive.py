"""The formula as three PyTorch calls a row, float32 inside: runs every problem, remembers all scores."""

from __future__ import annotations

import torch

from strobe.attention.problem import AttentionProblem
from strobe.attention.rows import Row, rows_of

TAKES_BIAS = True
DIFFERENTIABLE = True
IDEA = "matmul, mask, softmax, matmul; the whole score matrix stands in memory"


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
    """docs/math.md, equations 1 to 4."""
    for row in rows_of(problem, q, k, v):
        row_out, row_lse = attend(problem, row)
        row.write(out, row_out)
        if lse is not None:
            row.write_lse(lse, row_lse)


def attend(problem: AttentionProblem, row: Row) -> tuple[torch.Tensor, torch.Tensor]:
    """`out [q_heads, q_len, head_dim]` and `lse [q_heads, q_len]`, float32 (float64 for float64 inputs)."""
    dtype = torch.float64 if row.q.dtype == torch.float64 else torch.float32
    # [kv_heads, group, q_len, head_dim] against [kv_heads, 1, kv_len, head_dim]
    q = row.q.to(dtype).transpose(0, 1).unflatten(0, (problem.kv_heads, problem.group))
    k = row.k.to(dtype).transpose(0, 1).unsqueeze(1)
    v = row.v.to(dtype).transpose(0, 1).unsqueeze(1)
    scores = q @ k.transpose(-1, -2) * problem.scale
    if problem.softcap:
        scores = problem.softcap * torch.tanh(scores / problem.softcap)
    if problem.bias is not None:
        everyone = (problem.batch, problem.q_heads, problem.q_len, problem.kv_len)
        scores = scores + problem.bias.expand(everyone)[row.index].unflatten(0, scores.shape[:2])
    if problem.masked:
        scores = scores.masked_fill(~row.visible(problem), float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    if problem.sinks is not None:
        sinks = problem.sinks.to(dtype).view(problem.kv_heads, problem.group, 1)
        lse = torch.logaddexp(lse, sinks)
    # exp(-inf - -inf) is NaN; a row that sees nothing has weights exp(-inf - 0) = 0
    weights = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1))
    return (weights @ v).flatten(0, 1), lse.flatten(0, 1)
