"""The kernel of `numba_paged`: docs/math.md, eq. 4 and 5, over the pages where they lie."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numba
import numpy as np

from strobe.cpu.jit import FASTMATH, compiled
from strobe.cpu.kernel import exp, floats, integers, longs

SIZES = (
    "rows", "tokens", "q_len", "q_heads", "kv_heads", "page_size", "table_width", "left", "right",
    "q_row", "q_token", "q_head", "k_page", "k_token", "k_head", "v_page", "v_token", "v_head",
)  # fmt: skip
"""What `attend` takes as one int64 array: sizes, the window, and strides in bytes."""

_KEYS = 64
"""Keys of one pass: with their values they stay near while all queries of a row's heads read them."""
_ZERO, _NOTHING = np.float32(0.0), np.float32(-np.inf)


@numba.njit
def _find(k_at, v_at, first, pages, sizes):
    """Where the keys and values from `first` on lie, in bytes from the cache's start."""
    page_size, k_page, k_token, v_page, v_token = sizes
    slot, offset = first // page_size, first % page_size
    k_base, v_base = pages[slot] * k_page, pages[slot] * v_page
    for c in range(k_at.size):
        k_at[c], v_at[c] = k_base + offset * k_token, v_base + offset * v_token
        offset += 1
        if offset == page_size and c + 1 < k_at.size:
            slot, offset = slot + 1, 0
            k_base, v_base = pages[slot] * k_page, pages[slot] * v_page


@numba.njit(fastmath=FASTMATH)
def _scaled(scores, scale, softcap):
    """Scores scaled and capped, in place; the largest."""
    highest = _NOTHING
    for c in range(scores.size):
        scores[c] *= scale
    if softcap > 0:
        for c in range(scores.size):
            scores[c] = softcap * np.tanh(scores[c] / softcap)
    for c in range(scores.size):
        highest = max(highest, scores[c])
    return highest


@numba.njit(fastmath=FASTMATH)
def _weigh(scores, highest):
    """Scores become weights `exp(score - highest)`; their sum."""
    total = _ZERO
    for c in range(scores.size):
        weight = exp(scores[c] - highest)
        scores[c] = weight
        total += weight
    return total


@numba.njit(fastmath=FASTMATH)
def _finish(total, highest, weight, sink, out):
    """The output from a row's sums, and its lse; no key and no sink give 0 and -inf."""
    top = max(highest, sink)
    if top == _NOTHING:
        out[:] = _ZERO
        return _NOTHING
    shrink = _ZERO if highest == _NOTHING else exp(highest - top)
    weight = weight * shrink + (_ZERO if sink == _NOTHING else exp(sink - top))
    factor = shrink / weight
    for i in range(total.size):
        out[i] = total[i] * factor
    return top + np.log(weight)


@numba.njit(fastmath=FASTMATH, inline="always")
def _score(q_at, k_at, keys, scores, size):
    """A query's dot products with the keys, four at a time."""
    q = floats(q_at, (size,))
    fours = keys.size // 4 * 4
    for c in range(0, fours, 4):
        k0, k1 = floats(k_at + keys[c], (size,)), floats(k_at + keys[c + 1], (size,))
        k2, k3 = floats(k_at + keys[c + 2], (size,)), floats(k_at + keys[c + 3], (size,))
        s0 = s1 = s2 = s3 = _ZERO
        for i in range(size):
            s0 += q[i] * k0[i]
            s1 += q[i] * k1[i]
            s2 += q[i] * k2[i]
            s3 += q[i] * k3[i]
        scores[c], scores[c + 1], scores[c + 2], scores[c + 3] = s0, s1, s2, s3
    for c in range(fours, keys.size):
        k0, s0 = floats(k_at + keys[c], (size,)), _ZERO
        for i in range(size):
            s0 += q[i] * k0[i]
        scores[c] = s0


@numba.njit(fastmath=FASTMATH, inline="always")
def _add_values(weights, v_at, values, shrink, total, size):
    """`total * shrink` and the weighted values, four at a time."""
    for i in range(size):
        total[i] *= shrink
    fours = values.size // 4 * 4
    for c in range(0, fours, 4):
        v0, v1 = floats(v_at + values[c], (size,)), floats(v_at + values[c + 1], (size,))
        v2, v3 = floats(v_at + values[c + 2], (size,)), floats(v_at + values[c + 3], (size,))
        w0, w1, w2, w3 = weights[c], weights[c + 1], weights[c + 2], weights[c + 3]
        for i in range(size):
            total[i] += w0 * v0[i] + w1 * v1[i] + w2 * v2[i] + w3 * v3[i]
    for c in range(fours, values.size):
        v0, w0 = floats(v_at + values[c], (size,)), weights[c]
        for i in range(size):
            total[i] += w0 * v0[i]


@cache
def kernel(head_dim: int) -> Callable[..., Any]:
    """`attend` for heads of this size, which its loops are unrolled by."""
    size = head_dim

    @compiled(
        "void(intp, intp, intp, intp, intp, intp, intp, intp, intp, intp, float32, float32, intp, intp)"
    )
    def attend(
        q_at, k_at, v_at, out_at, lse_at, table_at, lens_at, starts_at, sinks_at, sizes_at,
        scale, softcap, begin, end,
    ):  # fmt: skip
        """Key heads `[begin, end)` of all rows, counted row by row. An address of 0: what is not there."""
        (
            rows, tokens, q_len, q_heads, kv_heads, page_size, table_width, left, right,
            q_row, q_token, q_head, k_page, k_token, k_head, v_page, v_token, v_head,
        ) = longs(sizes_at, (18,))  # fmt: skip
        group = q_heads // kv_heads
        table, lens = integers(table_at, (rows, table_width)), integers(lens_at, (rows,))
        paging = (page_size, k_page, k_token, v_page, v_token)
        sums, scores = np.empty((q_heads, size), np.float32), np.empty(_KEYS, np.float32)
        highest, weight = np.empty(q_heads, np.float32), np.empty(q_heads, np.float32)
        keys, values = np.empty(_KEYS, np.int64), np.empty(_KEYS, np.int64)
        unit = begin
        while unit < end:
            row, first_head = unit // kv_heads, unit % kv_heads
            last_head = min(kv_heads, first_head + end - unit)
            unit += last_head - first_head
            kv_len, count, token = lens[row], q_len, row * q_len
            if starts_at != 0:
                starts = integers(starts_at, (rows + 1,))
                token, count = starts[row], starts[row + 1] - starts[row]
            for i in range(count):
                query = q_at + ((token + i) * q_token if starts_at != 0 else row * q_row + i * q_token)
                position = kv_len - count + i
                first = 0 if left < 0 else max(0, position - left)
                last = kv_len if right < 0 else min(kv_len, position + right + 1)
                sums[:], weight[:], highest[:] = _ZERO, _ZERO, _NOTHING
                for start in range(first, last, _KEYS):
                    n = min(_KEYS, last - start)
                    k_here, v_here, scored = keys[:n], values[:n], scores[:n]
                    _find(k_here, v_here, start, table[row], paging)
                    for head in range(first_head * group, last_head * group):
                        kv_head = head // group
                        _score(query + head * q_head, k_at + kv_head * k_head, k_here, scored, size)
                        top = max(highest[head], _scaled(scored, scale, softcap))
                        shrink = exp(highest[head] - top)
                        weight[head] = weight[head] * shrink + _weigh(scored, top)
                        _add_values(scored, v_at + kv_head * v_head, v_here, shrink, sums[head], size)
                        highest[head] = top
                for head in range(first_head * group, last_head * group):
                    sink = _NOTHING if sinks_at == 0 else floats(sinks_at, (q_heads,))[head]
                    out = floats(out_at + 4 * ((token + i) * q_heads + head) * size, (size,))
                    lse = _finish(sums[head], highest[head], weight[head], sink, out)
                    if lse_at != 0 and starts_at != 0:
                        floats(lse_at, (q_heads, tokens))[head, token + i] = lse
                    elif lse_at != 0:
                        floats(lse_at, (rows, q_heads, q_len))[row, head, i] = lse

    return attend
