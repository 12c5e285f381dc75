"""The formula with its middle step in CUDA: cuBLAS, a softmax kernel of our own, cuBLAS."""

from __future__ import annotations

import torch

from strobe.attention.problem import AttentionProblem
from strobe.attention.rows import Row, rows_of
from strobe.cuda import needs
from strobe.ops.softmax import softmax

IDEA = "matmul, mask, a softmax kernel that reads each row twice, matmul; both products on tensor cores"

_DTYPES = ("float16", "bfloat16")


def refusals(problem: AttentionProblem) -> list[str]:
    reasons = needs.refusals(problem.device, problem.arch)
    if problem.dtype not in _DTYPES:
        reasons.append(f"dtype {problem.dtype}; supported: {', '.join(_DTYPES)}")
    if problem.kv_dtype != problem.dtype:
        reasons.append(f"k and v in {problem.kv_dtype}; supported: q's dtype")
    if problem.softcap:
        reasons.append("softcap; supported: none")
    if problem.sinks is not None:
        reasons.append("sinks; supported: none")
    return reasons


def run(
    problem: AttentionProblem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    """docs/math.md, equations 1 to 3, a row at a time; the pages of a paged row are gathered first."""
    for row in rows_of(problem, q, k, v):
        scores = _scores(problem, row)
        weights = softmax(scores).to(row.v.dtype)
        row_out = torch.bmm(weights, row.v.transpose(0, 1))
        row.write(out, row_out.view(problem.q_heads, -1, problem.head_dim))
        if lse is not None:
            row.write_lse(lse, torch.logsumexp(scores, dim=-1).view(problem.q_heads, -1))


def _scores(problem: AttentionProblem, row: Row) -> torch.Tensor:
    """float32 `[kv_heads, group * q_len, kv_len]`: the queries of one key head are one matrix."""
    q = row.q.transpose(0, 1).reshape(problem.kv_heads, -1, problem.head_dim)
    scores = torch.bmm(q, row.k.permute(1, 2, 0), out_dtype=torch.float32).mul_(problem.scale)
    if problem.masked:
        each = scores.view(problem.kv_heads, problem.group, len(row.q), len(row.k))
        each.masked_fill_(~row.visible(problem), float("-inf"))
    return scores
