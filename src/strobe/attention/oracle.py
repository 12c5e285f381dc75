"""The formula in NumPy float64: what every rung is compared with.

Plain on purpose. One row and one head at a time: scores, softcap, mask, softmax with an optional
sink, weighted sum (docs/math.md, equations 1 to 4).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from strobe.attention.problem import AttentionProblem, Packed, Paged


def attention(problem: AttentionProblem, q: Any, k: Any, v: Any) -> tuple[np.ndarray, np.ndarray]:
    """`(out, lse)` in float64, laid out as the rungs lay them out.

    q, k and v are torch tensors or arrays of the problem's layout, in any dtype and on any device.
    """
    q, k, v = _float64(q), _float64(k), _float64(v)
    sinks = None if problem.sinks is None else _float64(problem.sinks)
    bias_shape = (problem.batch, problem.q_heads, problem.q_len, problem.kv_len)
    bias = None if problem.bias is None else np.broadcast_to(_float64(problem.bias), bias_shape)
    out = np.zeros_like(q)
    lse = np.empty(
        (problem.q_heads, q.shape[0]) if problem.packed_q else (problem.batch, problem.q_heads, problem.q_len)
    )
    for row, (q_len, kv_len) in enumerate(problem.row_lengths()):
        q_at = _query_rows(problem, row, q_len)
        keys, values = _row(problem, k, row, kv_len), _row(problem, v, row, kv_len)
        if isinstance(problem.layout, Paged) and problem.layout.k_scale is not None:
            keys = keys * _float64(problem.layout.k_scale)[:, None]
            values = values * _float64(problem.layout.v_scale)[:, None]
        for head in range(problem.q_heads):
            kv_head = head // problem.group
            sink = -np.inf if sinks is None else sinks[head]
            one_head = (q[q_at][:, head], keys[:, kv_head], values[:, kv_head])
            head_bias = None if bias is None else bias[row, head]
            row_out, row_lse = _one_head(problem, *one_head, sink, head_bias)
            out[q_at][:, head] = row_out
            if problem.packed_q:
                lse[head, q_at] = row_lse
            else:
                lse[row, head] = row_lse
    return out, lse


def visible(problem: AttentionProblem, q_len: int, kv_len: int) -> np.ndarray:
    """bool `[q_len, kv_len]`: which keys each query of a row of these lengths sees."""
    first, end = problem.key_range(q_len, kv_len)
    keys = np.arange(kv_len)
    return (keys >= first[:, None]) & (keys < end[:, None])


def _one_head(
    problem: AttentionProblem,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    sink: float,
    bias: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    """q `[q_len, head_dim]`, k and v `[kv_len, head_dim]` → out `[q_len, head_dim]`, lse `[q_len]`."""
    scores = q @ k.T * problem.scale
    if problem.softcap:
        scores = problem.softcap * np.tanh(scores / problem.softcap)
    if bias is not None:
        scores = scores + bias
    scores = np.where(visible(problem, len(q), len(k)), scores, -np.inf)
    highest = np.maximum(scores.max(axis=1, initial=-np.inf), sink)
    shift = np.where(np.isfinite(highest), highest, 0.0)
    weights = np.exp(scores - shift[:, None])
    total = weights.sum(axis=1) + np.exp(sink - shift)
    with np.errstate(divide="ignore"):
        lse = shift + np.log(total)
    return weights @ v / np.where(total > 0, total, 1.0)[:, None], lse


def _query_rows(problem: AttentionProblem, row: int, q_len: int) -> Any:
    """Where a row's queries stand in q: an index that gives a view `[q_len, q_heads, head_dim]`."""
    layout = problem.layout
    if isinstance(layout, (Packed, Paged)) and problem.packed_q:
        start = (layout.host_q or [0])[row]
        return slice(start, start + q_len)
    return row


def _row(problem: AttentionProblem, kv: np.ndarray, row: int, kv_len: int) -> np.ndarray:
    """A row's keys or values `[kv_len, kv_heads, head_dim]`."""
    layout = problem.layout
    if isinstance(layout, Packed):
        start = layout.host_kv[row]
        return kv[start : start + kv_len]
    if isinstance(layout, Paged):
        pages = -(-kv_len // problem.page_size)
        table = np.asarray(layout.page_table[row, :pages].tolist(), dtype=np.int64)
        return kv[table].reshape(-1, *kv.shape[2:])[:kv_len]
    return kv[row]


def _float64(tensor: Any) -> np.ndarray:
    if hasattr(tensor, "detach"):
        return tensor.detach().double().cpu().numpy()
    return np.asarray(tensor, dtype=np.float64)
