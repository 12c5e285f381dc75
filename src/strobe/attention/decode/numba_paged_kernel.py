"""The kernel of `numba_paged`: docs/math.md, eq. 4 and 5, over the pages where they lie."""

from __future__ import annotations

from functools import cache

import numba
import numpy as np

from strobe.cpu import jit
from strobe.cpu.jit import FASTMATH
from strobe.cpu.kernel import address, exp, floats, integers, longs, take
from strobe.cpu.threads import STATUS
from strobe.cpu.vector import add_weighted, dot_products

FIXED = (
    "page_table", "seq_lens", "cu_seqlens_q", "sinks", "factors",
    "rows", "tokens", "q_len", "q_heads", "kv_heads", "pages", "page_size", "table_width", "left", "right",
    "heads_a_part", "q_row", "q_token", "q_head",
    "k_page", "k_token", "k_head", "v_page", "v_token", "v_head",
)  # fmt: skip
"""What `attend` takes as one int64 array: addresses (0: not there), sizes, the window, strides in bytes."""
OUTSIDE = 1
"""The status of a call whose lengths or pages lie outside of what there is: its results are not written."""

_KEYS = 64
"""Keys of one pass: their scores and values stay near while all heads of a row read them."""
_QUERIES = 32
"""A row's queries that are one part of the work."""
_NEAR = 16
"""Keys that all heads' queries read before the next."""
_ZERO, _NOTHING = np.float32(0.0), np.float32(-np.inf)


@numba.njit
def _find(k_at, v_at, first, count, table, pages, paging):
    """Where `count` keys and values from `first` on lie, in bytes from the cache's start; False where a page
    is outside of it. Up to a multiple of 16 the last key stands again and again."""
    page_size, k_page, k_token, v_page, v_token = paging
    slot, offset = first // page_size, first % page_size
    c = 0
    while c < count:
        page = table[slot]
        if page < 0 or page >= pages:
            return False
        k_base, v_base = page * k_page, page * v_page
        last = min(page_size, offset + count - c)
        while offset < last:
            k_at[c], v_at[c] = k_base + offset * k_token, v_base + offset * v_token
            offset, c = offset + 1, c + 1
        slot, offset = slot + 1, 0
    while c % 16 != 0:
        k_at[c], c = k_at[count - 1], c + 1
    return True


@numba.njit(fastmath=FASTMATH)
def _scaled(scores, count, scale, softcap):
    """Scores scaled and capped, in place, -inf from the `count`-th on; the largest."""
    highest = _NOTHING
    for c in range(scores.size):
        scores[c] *= scale
    if softcap > 0:
        for c in range(scores.size):
            scores[c] = softcap * np.tanh(scores[c] / softcap)
    scores[count:] = _NOTHING
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


@cache
def kernel(head_dim: int) -> jit.Kernel:
    """`attend` for heads of this size."""
    size = head_dim

    @jit.kernel
    def attend(call_at):
        """Some of a row's queries, all its key heads or where rows are few one of them, as they are taken."""
        _, _, q_at, k_at, v_at, out_at, lse_at, fixed_at = longs(call_at, (8,))
        (
            table_at, lens_at, starts_at, sinks_at, factors_at,
            rows, tokens, q_len, q_heads, kv_heads, pages, page_size, table_width, left, right,
            heads_a_part, q_row, q_token, q_head, k_page, k_token, k_head, v_page, v_token, v_head,
        ) = longs(fixed_at, (25,))  # fmt: skip
        group, parts_a_row = q_heads // kv_heads, kv_heads // heads_a_part
        times = max(1, -(-q_len // _QUERIES))
        scale, softcap = floats(factors_at, (2,))
        table, lens = integers(table_at, (rows, table_width)), integers(lens_at, (rows,))
        paging = (page_size, k_page, k_token, v_page, v_token)
        sums, scores = np.empty((q_heads, size), np.float32), np.empty((q_heads, _KEYS), np.float32)
        highest, weight, shrink = np.empty((3, q_heads), np.float32)
        keys, values = np.empty((2, _KEYS), np.int64)
        sums_at, scores_at, shrink_at = address(sums), address(scores), address(shrink)
        keys_at, values_at = address(keys), address(values)
        score_strides, sum_strides = (q_head, 4 * _KEYS), (4 * _KEYS, 4 * size, 4)
        while True:
            part = take(call_at)
            part, first_query = part // times, part % times * _QUERIES
            row, first_kv = part // parts_a_row, part % parts_a_row * heads_a_part
            if row >= rows:
                return
            first_head, last_head = first_kv * group, (first_kv + heads_a_part) * group
            kv_len, count, token = lens[row], q_len, row * q_len
            if starts_at != 0:
                starts = integers(starts_at, (rows + 1,))
                token, count = starts[row], starts[row + 1] - starts[row]
            inside = 0 <= kv_len <= table_width * page_size and token >= 0 and token + count <= tokens
            if not (inside and 0 <= count <= q_len):
                longs(call_at, (2,))[STATUS] = OUTSIDE
                return
            for i in range(first_query, min(count, first_query + _QUERIES)):
                query = q_at + ((token + i) * q_token if starts_at != 0 else row * q_row + i * q_token)
                position = kv_len - count + i
                first = 0 if left < 0 else max(0, position - left)
                last = kv_len if right < 0 else min(kv_len, position + right + 1)
                sums[first_head:last_head] = _ZERO
                weight[:], highest[:] = _ZERO, _NOTHING
                for start in range(first, last, _KEYS):
                    n = min(_KEYS, last - start)
                    if not _find(keys, values, start, n, table[row], pages, paging):
                        longs(call_at, (2,))[STATUS] = OUTSIDE
                        return
                    for c in range(0, n, _NEAR):
                        near, offsets = min(_NEAR, n - c), keys_at + 8 * c
                        for kv_head in range(first_kv, first_kv + heads_a_part):
                            of_keys, end = k_at + kv_head * k_head, (kv_head + 1) * group
                            for head in range(kv_head * group, end, 2):
                                of_query, into = query + head * q_head, scores_at + 4 * (head * _KEYS + c)
                                if head + 1 < end:
                                    dot_products(
                                        of_query, of_keys, offsets, near, into, score_strides, size, 2
                                    )
                                else:
                                    dot_products(
                                        of_query, of_keys, offsets, near, into, score_strides, size, 1
                                    )
                    for head in range(first_head, last_head):
                        scored = scores[head, : -(-n // 16) * 16]
                        top = max(highest[head], _scaled(scored, n, scale, softcap))
                        shrink[head] = exp(highest[head] - top)
                        weight[head] = weight[head] * shrink[head] + _weigh(scored, top)
                        highest[head] = top
                    for kv_head in range(first_kv, first_kv + heads_a_part):
                        of_values, end = v_at + kv_head * v_head, (kv_head + 1) * group
                        for head in range(kv_head * group, end, 2):
                            by, into = scores_at + 4 * head * _KEYS, sums_at + 4 * head * size
                            kept = shrink_at + 4 * head
                            if head + 1 < end:
                                add_weighted(by, of_values, values_at, n, into, kept, sum_strides, size, 2)
                            else:
                                add_weighted(by, of_values, values_at, n, into, kept, sum_strides, size, 1)
                for head in range(first_head, last_head):
                    sink = _NOTHING if sinks_at == 0 else floats(sinks_at, (q_heads,))[head]
                    out = floats(out_at + 4 * ((token + i) * q_heads + head) * size, (size,))
                    lse = _finish(sums[head], highest[head], weight[head], sink, out)
                    if lse_at != 0 and starts_at != 0:
                        floats(lse_at, (q_heads, tokens))[head, token + i] = lse
                    elif lse_at != 0:
                        floats(lse_at, (rows, q_heads, q_len))[row, head, i] = lse

    return attend
