// Sums of shares (docs/math.md, eq. 6): what the warps of a block, or several blocks, know of the same query rows,
// each over keys of its own.
//
// Defines: as attend_tile.cuh.
#pragma once

#include "attend_tile.cuh"

constexpr int SHARE_PITCH = HEAD_DIM + 4;  // floats: the four column pairs of a quad meet different banks

struct Shares {  // of a block's warps, in shared memory
  float o[WARPS][COLUMNS][SHARE_PITCH];
  float m[WARPS][COLUMNS], l[WARPS][COLUMNS];
};

// A warp's state of a segment into shared memory.
__device__ __forceinline__ void share(Shares& shared, State& state, const Rows& rows) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int n = 0; n < COLUMN_TILES; ++n)
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int column = n * 8 + lane % 4 * 2 + j;
#pragma unroll
      for (int step = 4; step < 32; step *= 2) state.l[n][j] += __shfl_xor_sync(~0u, state.l[n][j], step);
      if (column < rows.count) {
        if (lane < 4) shared.m[warp][column] = state.m[n][j], shared.l[warp][column] = state.l[n][j];
#pragma unroll
        for (int d = 0; d < DIM_TILES; ++d) {
          shared.o[warp][column][d * 16 + Operands::v_feature(0)] = state.o[d][n][j];
          shared.o[warp][column][d * 16 + Operands::v_feature(1)] = state.o[d][n][2 + j];
        }
      }
    }
}

// Four features of one row: a weighted sum of shares, each with its own reference.
struct Sum {
  float m = UNSEEN, l = 0.f;
  float4 o = {0.f, 0.f, 0.f, 0.f};

  __device__ __forceinline__ void add(float weight, float sum, float4 share) {
    l += weight * sum;
    o.x += weight * share.x, o.y += weight * share.y, o.z += weight * share.z, o.w += weight * share.w;
  }

  __device__ __forceinline__ void raise(float reference) {
    const float weight = fast_exp2(m - reference);
    m = reference;
    l *= weight;
    o.x *= weight, o.y *= weight, o.z *= weight, o.w *= weight;
  }

  __device__ __forceinline__ void join(const Sum& other) {
    raise(fmaxf(m, other.m));
    add(fast_exp2(other.m - m), other.l, other.o);
  }
};

// The end of a row: out = o / l, lse = m + log l. A row that saw no key gives 0 and -inf.
__device__ __forceinline__ void finish(const Params& p, const Segment& s, const Rows& rows, int row, int dim, Sum sum) {
  const int token = rows.token(row), head = rows.head(row);
  if (SINKS) {
    const float sink = p.sinks[head] * LOG2E, m = fmaxf(sum.m, sink);
    const float weight = fast_exp2(sum.m - m);
    sum.l = sum.l * weight + fast_exp2(sink - m);
    sum.o.x *= weight, sum.o.y *= weight, sum.o.z *= weight, sum.o.w *= weight;
    sum.m = m;
  }
  const float v_scale = p.v_scale ? p.v_scale[rows.kv_head] : 1.f;
  const float inverse = sum.l > 0.f ? __fdividef(v_scale, sum.l) : 0.f;
  uint2 packed;
  packed.x = pack<scalar_t>(sum.o.x * inverse, sum.o.y * inverse);
  packed.y = pack<scalar_t>(sum.o.z * inverse, sum.o.w * inverse);
  scalar_t* out = p.out + (s.q_start + token) * p.out_token_stride + head * p.out_head_stride;
  *reinterpret_cast<uint2*>(out + dim) = packed;
  if (p.lse && dim == 0) {
    const i64 at = p.cu_seqlens_q ? s.q_start + token : s.row * p.lse_row_stride + token;
    p.lse[at + head * p.lse_head_stride] = sum.l > 0.f ? (sum.m + fast_log2(sum.l)) * LN2 : NEG_INF;
  }
}

// Four features of one query row of a segment, dealt to the threads one after the other.
struct Item {
  int key_head, row, dim;

  __device__ Item(int i, int rows) {
    const int line = i / (HEAD_DIM / 4);
    key_head = HEADS == 1 ? 0 : divide(line, rows);
    row = line - key_head * rows;
    dim = i % (HEAD_DIM / 4) * 4;
  }
  static __device__ int count(int rows) { return HEADS * rows * (HEAD_DIM / 4); }
};

// The warps' shares of an item added up.
__device__ __forceinline__ Sum sum_warps(const Shares& shares, const Item& at) {
  Sum sum;
#pragma unroll
  for (int warp = 0; warp < WARPS; warp += HEADS) sum.m = fmaxf(sum.m, shares.m[warp + at.key_head][at.row]);
#pragma unroll
  for (int warp = 0; warp < WARPS; warp += HEADS) {
    const int from = warp + at.key_head;
    sum.add(fast_exp2(shares.m[from][at.row] - sum.m), shares.l[from][at.row],
            *reinterpret_cast<const float4*>(&shares.o[from][at.row][at.dim]));
  }
  return sum;
}
