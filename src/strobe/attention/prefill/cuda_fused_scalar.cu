// FlashAttention in one kernel, a thread a query (docs/math.md, eq. 5; Dao et al. 2022, Algorithm 1).
//
// The score matrix never leaves the chip: a block keeps Q_TILE queries, walks over the keys K_TILE at a
// time, and each thread carries its row's maximum m, sum l and output in registers. Keys and values are
// read from shared memory by all threads of a warp at the same address, which costs one read for 32.
#include "dense.cuh"

constexpr int PITCH = Q_TILE + 1;  // odd: writing a query's elements down a column meets every bank

// Rows [first, first + K_TILE) of `rows` as float32; zeros past the last key.
__device__ __forceinline__ void load_tile(float* tile, const scalar_t* rows, i64 stride, int first, int kv_len) {
  constexpr int CHUNKS = HEAD_DIM / VEC<scalar_t>;
  for (int at = threadIdx.x; at < K_TILE * CHUNKS; at += Q_TILE) {
    const int row = at / CHUNKS, d = at % CHUNKS * VEC<scalar_t>;
    float x[VEC<scalar_t>] = {};
    if (first + row < kv_len) load_floats(rows + (first + row) * stride + d, x);
#pragma unroll
    for (int i = 0; i < VEC<scalar_t>; ++i) tile[row * HEAD_DIM + d + i] = x[i];
  }
}

// grid (q_len / Q_TILE, q_heads, batch)
extern "C" __global__ void __launch_bounds__(Q_TILE) attend(const __grid_constant__ DenseParams p) {
  extern __shared__ float4 shared[];
  float* k_tile = reinterpret_cast<float*>(shared);  // [K_TILE][HEAD_DIM]
  float* v_tile = k_tile + K_TILE * HEAD_DIM;        // [K_TILE][HEAD_DIM]
  float* q_tile = v_tile + K_TILE * HEAD_DIM;        // [HEAD_DIM][PITCH]: a warp reads 32 queries side by side
  const int me = threadIdx.x, head = blockIdx.y, batch = blockIdx.z;
  const int first_query = longest_first() * Q_TILE, query = first_query + me;
  const scalar_t* q = p.queries(batch, head);
  const scalar_t* keys = p.keys(batch, head);
  const scalar_t* values = p.values(batch, head);

  for (int at = me; at < Q_TILE * HEAD_DIM; at += Q_TILE) {
    const int row = at / HEAD_DIM, d = at % HEAD_DIM, from = min(first_query + row, p.q_len - 1);
    q_tile[d * PITCH + row] = to_float(q[from * p.q_strides.row + d]) * p.scale_log2e;
  }

  float out[HEAD_DIM] = {}, maximum = NEG_INF, sum = 0.f;
  const int visible = p.visible(query), end = p.visible(min(first_query + Q_TILE, p.q_len) - 1);
  for (int first = 0; first < end; first += K_TILE) {
    __syncthreads();
    load_tile(k_tile, keys, p.k_strides.row, first, p.kv_len);
    load_tile(v_tile, values, p.v_strides.row, first, p.kv_len);
    __syncthreads();

    float s[K_TILE] = {};
    for (int d = 0; d < HEAD_DIM; d += 4) {
      float mine[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) mine[i] = q_tile[(d + i) * PITCH + me];
#pragma unroll
      for (int j = 0; j < K_TILE; ++j) {
        const float4 k = *reinterpret_cast<const float4*>(&k_tile[j * HEAD_DIM + d]);
        s[j] += mine[0] * k.x + mine[1] * k.y + mine[2] * k.z + mine[3] * k.w;
      }
    }

    float highest = maximum;
#pragma unroll
    for (int j = 0; j < K_TILE; ++j) {
      if (first + j >= visible) s[j] = NEG_INF;
      highest = fmaxf(highest, s[j]);
    }
    const float alpha = rescale_factor(maximum, highest);
    maximum = highest;
    float tile_sum = 0.f;
#pragma unroll
    for (int j = 0; j < K_TILE; ++j) {
      s[j] = fast_exp2(s[j] - finite(maximum));
      tile_sum += s[j];
    }
    sum = sum * alpha + tile_sum;
#pragma unroll
    for (int d = 0; d < HEAD_DIM; d += 4) {
      float4 tile_out = {};  // short sums of short sums: rounding grows with the longer of the two only
#pragma unroll
      for (int j = 0; j < K_TILE; ++j) {
        const float4 v = *reinterpret_cast<const float4*>(&v_tile[j * HEAD_DIM + d]);
        tile_out.x += s[j] * v.x, tile_out.y += s[j] * v.y, tile_out.z += s[j] * v.z, tile_out.w += s[j] * v.w;
      }
      out[d] = out[d] * alpha + tile_out.x, out[d + 1] = out[d + 1] * alpha + tile_out.y;
      out[d + 2] = out[d + 2] * alpha + tile_out.z, out[d + 3] = out[d + 3] * alpha + tile_out.w;
    }
  }

  if (query >= p.q_len) return;
  const float normal = sum > 0.f ? 1.f / sum : 0.f;
  scalar_t* row = p.out_row(batch, head, query);
#pragma unroll
  for (int d = 0; d < HEAD_DIM; ++d) row[d] = from_float<scalar_t>(out[d] * normal);
  if (p.lse) p.lse[p.lse_index(batch, head, query)] = log_sum_exp(maximum, sum);
}
