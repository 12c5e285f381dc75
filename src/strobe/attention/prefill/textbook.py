"""The formula in NumPy float32, as a textbook writes it: scores, softmax, weighted sum."""

from __future__ import annotations

from typing import Any

import numpy as np

from strobe.attention.oracle import visible
from strobe.attention.problem import AttentionProblem
from strobe.attention.rows import numpy_heads, numpy_refusals

IDEA = "scores, softmax, weighted sum: three NumPy lines a head"


def refusals(problem: AttentionProblem) -> list[str]:
    return numpy_refusals(problem)


def run(problem: AttentionProblem, q: Any, k: Any, v: Any, out: Any, lse: Any) -> None:
    for head in numpy_heads(problem, q, k, v):
        mask = visible(problem, len(head.q), len(head.k)) if problem.masked else None
        head.write(out, lse, *attend(head.q, head.k, head.v, problem.scale, mask))


def attend(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, mask: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """docs/math.md, equations 1 to 3, for one head: `out [q_len, head_dim]` and `lse [q_len]`."""
    scores = (q @ k.T) * np.float32(scale)
    if mask is not None:
        scores = np.where(mask, scores, -np.inf)
    highest = scores.max(axis=1, initial=-np.inf, keepdims=True)
    highest = np.where(np.isfinite(highest), highest, 0)
    weights = np.exp(scores - highest)
    total = weights.sum(axis=1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (highest + np.log(total))[:, 0]
    return weights @ v / np.where(total > 0, total, 1), lse
