"""The kernels of triton_split. Importing this imports triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def partials(
    q, k, v, o, m, sums, seq_lens, page_table,
    q_row_stride, q_head_stride, k_page_stride, k_token_stride, k_head_stride,
    v_page_stride, v_token_stride, v_head_stride, table_stride, scale_log2,
    HEAD_DIM: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, PAGE_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """One share of the keys of one key head of one row: (o, m, l) of its GROUP queries (docs/math.md, eq. 5).

    The queries stand in ROWS rows, the fewest that a product takes.
    """
    split, kv_head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits, kv_heads = tl.num_programs(0), tl.num_programs(1)
    kv_len = tl.load(seq_lens + row)
    share = tl.cdiv(tl.cdiv(kv_len, TILE), splits) * TILE
    begin, end = split * share, tl.minimum(kv_len, (split + 1) * share)

    member, feature = tl.arange(0, ROWS), tl.arange(0, HEAD_DIM)
    head = kv_head * GROUP + member
    at = row.to(tl.int64) * q_row_stride + head[:, None] * q_head_stride + feature[None, :]
    queries = tl.load(q + at, mask=member[:, None] < GROUP, other=0.0)
    acc = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    for start in tl.range(begin, end, TILE):
        key = start + tl.arange(0, TILE)
        seen = key < end
        page = tl.load(
            page_table + row.to(tl.int64) * table_stride + key // PAGE_SIZE, mask=seen, other=0
        ).to(tl.int64)
        slot = key % PAGE_SIZE
        k_at = page * k_page_stride + slot * k_token_stride + kv_head * k_head_stride
        keys = tl.load(k + k_at[:, None] + feature[None, :], mask=seen[:, None], other=0.0)
        v_at = page * v_page_stride + slot * v_token_stride + kv_head * v_head_stride
        values = tl.load(v + v_at[:, None] + feature[None, :], mask=seen[:, None], other=0.0)
        scores = tl.where(seen[None, :], tl.dot(queries, tl.trans(keys)) * scale_log2, float("-inf"))
        raised = tl.maximum(highest, tl.max(scores, 1))  # finite: every tile has a key
        weights = tl.exp2(scores - raised[:, None])
        factor = tl.exp2(highest - raised)
        total = total * factor + tl.sum(weights, 1)
        acc = tl.dot(weights.to(values.dtype), values, acc * factor[:, None])
        highest = raised

    part = (row.to(tl.int64) * kv_heads * GROUP + head) * splits + split
    mine = member < GROUP
    tl.store(o + part[:, None] * HEAD_DIM + feature[None, :], acc, mask=mine[:, None])
    tl.store(m + part, highest, mask=mine)
    tl.store(sums + part, total, mask=mine)


@triton.jit
def merge(
    o, m, sums, out, lse, out_row_stride, out_head_stride, splits,
    HEAD_DIM: tl.constexpr, SPLITS: tl.constexpr, WITH_LSE: tl.constexpr,
):  # fmt: skip
    """The shares of one query, rescaled to their common maximum and summed (eq. 6)."""
    head, row, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    split, feature = tl.arange(0, SPLITS), tl.arange(0, HEAD_DIM)
    part = (row.to(tl.int64) * heads + head) * splits + split
    there = split < splits
    maxima = tl.load(m + part, mask=there, other=float("-inf"))
    highest = tl.max(maxima, 0)
    weights = tl.where(
        maxima == float("-inf"), 0.0, tl.exp2(maxima - tl.where(highest == float("-inf"), 0.0, highest))
    )
    total = tl.sum(weights * tl.load(sums + part, mask=there, other=0.0), 0)
    shares = tl.load(o + part[:, None] * HEAD_DIM + feature[None, :], mask=there[:, None], other=0.0)
    merged = tl.sum(shares * weights[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(
        out + row.to(tl.int64) * out_row_stride + head * out_head_stride + feature,
        merged.to(out.dtype.element_ty),
    )
    if WITH_LSE:
        natural = tl.where(total == 0.0, float("-inf"), (highest + tl.log2(total)) * 0.6931471805599453)
        tl.store(lse + row * heads + head, natural)
