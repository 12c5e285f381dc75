// Attention on one warp's tensor cores: 16 queries against tiles of keys and values in shared memory
// (docs/math.md, eq. 5). What goes from one product to the next stays in registers: the accumulator
// layout of QKᵀ is the operand layout of PV (mma.cuh).
#pragma once

#include "dense.cuh"
#include "mma.cuh"
#include "reduce.cuh"

// ROWS x DIM 16-bit elements in shared memory, rows 16 bytes longer than they need be: eight neighbouring
// rows then start in eight different bank groups, which is what ldmatrix reads at a time.
template <int ROWS, int DIM>
struct PaddedTile {
  static constexpr int PITCH = DIM + 8;
  static constexpr int BYTES = 2 * ROWS * PITCH;

  // Rows [first, first + ROWS) of `rows`, 16 bytes a thread at a time; zeros past `end`. A thread starts four
  // reads before it waits for the first.
  template <int THREADS, class T>
  static __device__ __forceinline__ void load(T* tile, const T* rows, i64 stride, int first, int end) {
    constexpr int CHUNKS = DIM / 8, PIECES = ROWS * CHUNKS, BATCH = 4;
#pragma unroll 1
    for (int start = threadIdx.x; start < PIECES; start += BATCH * THREADS) {
      uint4 x[BATCH];
#pragma unroll
      for (int i = 0; i < BATCH; ++i) {
        const int at = start + i * THREADS, row = at / CHUNKS, d = at % CHUNKS * 8;
        const bool inside = at < PIECES && first + row < end;
        x[i] = inside ? *reinterpret_cast<const uint4*>(rows + (first + row) * stride + d) : make_uint4(0, 0, 0, 0);
      }
#pragma unroll
      for (int i = 0; i < BATCH; ++i) {
        const int at = start + i * THREADS, row = at / CHUNKS, d = at % CHUNKS * 8;
        if (at < PIECES) *reinterpret_cast<uint4*>(tile + row * PITCH + d) = x[i];
      }
    }
  }
};

// Where a lane points ldmatrix to read a 16 x 16 tile as four 8 x 8 matrices, in elements from its corner.
// A operands and transposed B operands come down the rows first, B operands along them.
__device__ __forceinline__ int down_then_along(int pitch) {
  const int lane = threadIdx.x % 32;
  return lane % 16 * pitch + lane / 16 * 8;
}
__device__ __forceinline__ int along_then_down(int pitch) {
  const int lane = threadIdx.x % 32;
  return (lane % 8 + lane / 16 * 8) * pitch + lane / 8 % 2 * 8;
}

// c [16 x 8 N] += a [16 x 16] b, with b's 16 x 16 tiles at `b + n 16 pitch` (a row an output column: K) ...
template <class T, int N>
__device__ __forceinline__ void multiply_rows(float (&c)[N][4], const u32 (&a)[4], const T* b, int pitch) {
#pragma unroll
  for (int n = 0; n < N; n += 2) {
    u32 m[4];
    load_matrices(m, shared_address(b + n * 8 * pitch + along_then_down(pitch)));
    mma_16x8x16<T>(c[n], a, m[0], m[1]);
    mma_16x8x16<T>(c[n + 1], a, m[2], m[3]);
  }
}
// ... or at `b + n 16` (a column an output column: V).
template <class T, int N>
__device__ __forceinline__ void multiply_columns(float (&c)[N][4], const u32 (&a)[4], const T* b, int pitch) {
#pragma unroll
  for (int n = 0; n < N; n += 2) {
    u32 m[4];
    load_matrices_transposed(m, shared_address(b + n * 8 + down_then_along(pitch)));
    mma_16x8x16<T>(c[n], a, m[0], m[1]);
    mma_16x8x16<T>(c[n + 1], a, m[2], m[3]);
  }
}

// 16 queries of one warp: operand, output, running maximum (an exponent of 2) and sum. A lane holds two of
// the rows, `half` 0 and 1: lane / 4 and lane / 4 + 8.
template <class T, int DIM, int KEYS>
struct WarpQueries {
  using Tile = PaddedTile<KEYS, DIM>;
  u32 q[DIM / 16][4];
  float out[DIM / 8][4] = {};
  float maximum[2] = {NEG_INF, NEG_INF};
  float sum[2] = {};  // over this lane's columns only, until `finish`

  // From 16 rows in shared memory.
  __device__ __forceinline__ WarpQueries(const T* rows) {
#pragma unroll
    for (int d = 0; d < DIM / 16; ++d)
      load_matrices(q[d], shared_address(rows + 16 * d + down_then_along(Tile::PITCH)));
  }

  // Row `half` sees the first `visible[half]` keys of this tile.
  __device__ __forceinline__ void attend(const T* k, const T* v, float scale_log2e, const int (&visible)[2]) {
    float s[KEYS / 8][4] = {};
#pragma unroll
    for (int d = 0; d < DIM / 16; ++d) multiply_rows<T>(s, q[d], k + 16 * d, Tile::PITCH);

    const int column = threadIdx.x % 4 * 2;
    float highest[2] = {maximum[0], maximum[1]};
#pragma unroll
    for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[n][i] = 8 * n + column + i % 2 < visible[i / 2] ? s[n][i] * scale_log2e : NEG_INF;
        highest[i / 2] = fmaxf(highest[i / 2], s[n][i]);
      }
    float shift[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      highest[half] = warp_max<4>(highest[half]);
      const float alpha = rescale_factor(maximum[half], highest[half]);
      maximum[half] = highest[half], shift[half] = finite(highest[half]), sum[half] *= alpha;
#pragma unroll
      for (int n = 0; n < DIM / 8; ++n) out[n][2 * half] *= alpha, out[n][2 * half + 1] *= alpha;
    }
#pragma unroll
    for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[n][i] = fast_exp2(s[n][i] - shift[i / 2]);
        sum[i / 2] += s[n][i];
      }
#pragma unroll
    for (int n = 0; n < KEYS / 16; ++n) {
      const u32 weights[4] = {pack<T>(s[2 * n][0], s[2 * n][1]), pack<T>(s[2 * n][2], s[2 * n][3]),
                              pack<T>(s[2 * n + 1][0], s[2 * n + 1][1]), pack<T>(s[2 * n + 1][2], s[2 * n + 1][3])};
      multiply_columns<T>(out, weights, v + 16 * n * Tile::PITCH, Tile::PITCH);
    }
  }

  // The rows' sums complete, in every lane that holds the row.
  __device__ __forceinline__ void finish() {
    sum[0] = warp_sum<4>(sum[0]), sum[1] = warp_sum<4>(sum[1]);
  }

  // The two rows' answers, queries `row` and `row + 8` of a head; after `finish`.
  __device__ __forceinline__ void write(const DenseParams& p, int batch, int head, int row) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = row + 8 * half;
      if (query >= p.q_len) continue;
      const float normal = sum[half] > 0.f ? 1.f / sum[half] : 0.f;
      u32* to = reinterpret_cast<u32*>(p.out_row(batch, head, query)) + lane % 4;
#pragma unroll
      for (int n = 0; n < DIM / 8; ++n) to[4 * n] = pack<T>(out[n][2 * half] * normal, out[n][2 * half + 1] * normal);
      if (p.lse && lane % 4 == 0) p.lse[p.lse_index(batch, head, query)] = log_sum_exp(maximum[half], sum[half]);
    }
  }
};
