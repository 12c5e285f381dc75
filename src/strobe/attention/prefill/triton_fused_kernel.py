"""The kernel of triton_fused: FlashAttention-2 in Triton. Importing this imports triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _attend_tiles(
    q, acc, total, highest, k_rows, v_rows, kv_row, kv_column, begin, end, q_position, kv_len, scale_log2,
    K_TILE: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The keys [begin, end) of one row, K_TILE at a time (docs/math.md, equation 5)."""
    for start in tl.range(begin, end, K_TILE):
        k = k_rows.load([kv_row + start, kv_column])
        scores = tl.dot(q, k.T)
        if MASKED:
            key = start + tl.arange(0, K_TILE)
            seen = (key < kv_len)[None, :]
            if CAUSAL:
                seen = seen & (key[None, :] <= q_position[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        raised = tl.maximum(highest, tl.max(scores, 1) * scale_log2)
        shift = tl.where(raised == float("-inf"), 0.0, raised) if MASKED else raised
        weights = tl.exp2(scores * scale_log2 - shift[:, None])
        factor = tl.exp2(highest - shift)
        total = total * factor + tl.sum(weights, 1)
        acc = acc * factor[:, None]
        v = v_rows.load([kv_row + start, kv_column])
        if MASKED:  # past a row's end stands another row, or anything at all: 0 x NaN must not reach acc
            v = tl.where((key < kv_len)[:, None], v, 0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc)
        highest = raised
    return acc, total, highest


@triton.jit
def attend(
    q_rows, k_rows, v_rows, out, lse, cu_seqlens_q, cu_seqlens_kv, q_len, kv_len, q_heads,
    out_batch_stride, out_row_stride, out_head_stride, lse_batch_stride, lse_head_stride, scale_log2,
    HEAD_DIM: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr,
    WITH_LSE: tl.constexpr, Q_TILE: tl.constexpr, K_TILE: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head. The descriptors are of `[batch x length, heads x head_dim]`.

    Keys that every query of the tile sees come first, unmasked; then those on the diagonal and the
    end; those that none of them sees are never touched. Where causal, long tiles start first.
    """
    batch, head = tl.program_id(1) // q_heads, tl.program_id(1) % q_heads
    q_tile = tl.num_programs(0) - 1 - tl.program_id(0) if CAUSAL else tl.program_id(0)
    q_row, kv_row = batch * q_len, batch * kv_len
    if PACKED:
        q_row, kv_row = tl.load(cu_seqlens_q + batch), tl.load(cu_seqlens_kv + batch)
        q_len = tl.load(cu_seqlens_q + batch + 1) - q_row
        kv_len = tl.load(cu_seqlens_kv + batch + 1) - kv_row
    first = q_tile * Q_TILE
    if first >= q_len:
        return
    row = first + tl.arange(0, Q_TILE)
    q_position = row + (kv_len - q_len)
    full_end, end = kv_len, kv_len
    if CAUSAL:
        full_end = tl.minimum(kv_len, tl.maximum(0, first + kv_len - q_len + 1))
        end = tl.minimum(kv_len, tl.maximum(0, first + Q_TILE + kv_len - q_len))
    full_end = full_end // K_TILE * K_TILE

    q = q_rows.load([q_row + first, head * HEAD_DIM])
    acc = tl.zeros([Q_TILE, HEAD_DIM], tl.float32)
    total = tl.zeros([Q_TILE], tl.float32)
    highest = tl.full([Q_TILE], float("-inf"), tl.float32)
    kv_column = head // GROUP * HEAD_DIM
    acc, total, highest = _attend_tiles(
        q, acc, total, highest, k_rows, v_rows, kv_row, kv_column, 0, full_end, q_position, kv_len,
        scale_log2, K_TILE, CAUSAL, False,
    )  # fmt: skip
    acc, total, highest = _attend_tiles(
        q, acc, total, highest, k_rows, v_rows, kv_row, kv_column, full_end, end, q_position, kv_len,
        scale_log2, K_TILE, CAUSAL, True,
    )  # fmt: skip

    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    valid = row < q_len
    out_at = out + head * out_head_stride
    out_at += q_row.to(tl.int64) * out_row_stride if PACKED else batch.to(tl.int64) * out_batch_stride
    at = row.to(tl.int64)[:, None] * out_row_stride + tl.arange(0, HEAD_DIM)[None, :]
    tl.store(out_at + at, acc.to(out.dtype.element_ty), mask=valid[:, None])
    if WITH_LSE:
        natural = tl.where(empty, float("-inf"), (highest + tl.log2(total)) * 0.6931471805599453)
        lse_at = lse + head * lse_head_stride + (q_row if PACKED else batch.to(tl.int64) * lse_batch_stride)
        tl.store(lse_at + row, natural, mask=valid)
