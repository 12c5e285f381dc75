// Attention as the textbook writes it, in four kernels (docs/math.md, eq. 1 to 3), the score matrix in memory.
//
//   scores          S = Q Kᵀ                 [batch x q_heads, q_len, kv_len] float32
//   scale_and_mask  S = scale S, -inf where not seen
//   softmax_rows    S = softmax of each row, lse
//   weigh_values    O = S V
//
// The two products are the tiled matrix multiplication every course begins with: a block computes EDGE x
// EDGE results, a thread one of them, and the operands come through shared memory EDGE columns at a time,
// so that each element is read from memory kv_len / EDGE (or q_len / EDGE) times instead of kv_len times.
#include "dense.cuh"
#include "reduce.cuh"

constexpr int ROW_THREADS = 256;

// S[z, i, j] = sum over d of Q[i, d] K[j, d]            eq. 1, unscaled
// grid (kv_len / EDGE, q_len / EDGE, batch x q_heads), block (EDGE, EDGE)
extern "C" __global__ void __launch_bounds__(EDGE * EDGE)
scores(const __grid_constant__ DenseParams p, float* s) {
  __shared__ float q_tile[EDGE][EDGE + 1];  // [query][d]; the odd pitch spreads a column over all banks
  __shared__ float k_tile[EDGE][EDGE + 1];  // [key][d]
  const int batch = blockIdx.z / p.q_heads, head = blockIdx.z % p.q_heads;
  const int x = threadIdx.x, y = threadIdx.y;
  const int query = blockIdx.y * EDGE + y, first_key = blockIdx.x * EDGE;
  const scalar_t* q = p.queries(batch, head) + query * p.q_strides.row;
  const scalar_t* k = p.keys(batch, head) + (first_key + y) * p.k_strides.row;

  float sum = 0.f;
  for (int d = 0; d < HEAD_DIM; d += EDGE) {
    const bool inside = d + x < HEAD_DIM;
    q_tile[y][x] = inside && query < p.q_len ? to_float(q[d + x]) : 0.f;
    k_tile[y][x] = inside && first_key + y < p.kv_len ? to_float(k[d + x]) : 0.f;
    __syncthreads();
    float tile_sum = 0.f;  // short sums of short sums: rounding grows with the longer of the two only
#pragma unroll
    for (int i = 0; i < EDGE; ++i) tile_sum += q_tile[y][i] * k_tile[x][i];
    sum += tile_sum;
    __syncthreads();
  }
  const int key = first_key + x;
  if (query < p.q_len && key < p.kv_len) s[(i64(blockIdx.z) * p.q_len + query) * p.kv_len + key] = sum;
}

// S[z, i, j] = scale S[z, i, j], or -inf where query i does not see key j            eq. 1
extern "C" __global__ void scale_and_mask(const __grid_constant__ DenseParams p, float* s, i64 elements) {
  const float scale = p.scale_log2e * LN2;
  for (i64 at = i64(blockIdx.x) * blockDim.x + threadIdx.x; at < elements; at += i64(gridDim.x) * blockDim.x) {
    const int key = at % p.kv_len, query = at / p.kv_len % p.q_len;
    s[at] = key < p.visible(query) ? s[at] * scale : NEG_INF;
  }
}

// Each row of S becomes its softmax, in place; lse (may be null) its log-sum-exp.            eq. 2
// A block a row, reduced through shared memory.
extern "C" __global__ void __launch_bounds__(ROW_THREADS) softmax_rows(float* s, float* lse, int columns) {
  __shared__ float scratch[ROW_THREADS / 32];
  float* row = s + i64(blockIdx.x) * columns;

  float maximum = NEG_INF;
  for (int j = threadIdx.x; j < columns; j += ROW_THREADS) maximum = fmaxf(maximum, row[j]);
  maximum = block_max<ROW_THREADS>(maximum, scratch);

  float sum = 0.f;
  for (int j = threadIdx.x; j < columns; j += ROW_THREADS) {
    const float weight = fast_exp2((row[j] - finite(maximum)) * LOG2E);
    row[j] = weight;
    sum += weight;
  }
  sum = block_sum<ROW_THREADS>(sum, scratch);

  const float normal = sum > 0.f ? 1.f / sum : 0.f;  // a row that sees no key is 0
  for (int j = threadIdx.x; j < columns; j += ROW_THREADS) row[j] *= normal;
  if (lse && threadIdx.x == 0) lse[blockIdx.x] = log_sum_exp(maximum * LOG2E, sum);
}

// O[i, d] = sum over j of P[z, i, j] V[j, d]            eq. 3
// grid (HEAD_DIM / EDGE, q_len / EDGE, batch x q_heads), block (EDGE, EDGE)
extern "C" __global__ void __launch_bounds__(EDGE * EDGE)
weigh_values(const __grid_constant__ DenseParams p, const float* weights) {
  __shared__ float p_tile[EDGE][EDGE];  // [query][key]
  __shared__ float v_tile[EDGE][EDGE];  // [key][d]
  const int batch = blockIdx.z / p.q_heads, head = blockIdx.z % p.q_heads;
  const int x = threadIdx.x, y = threadIdx.y;
  const int query = blockIdx.y * EDGE + y, d = blockIdx.x * EDGE + x;
  const float* row = weights + (i64(blockIdx.z) * p.q_len + query) * p.kv_len;
  const scalar_t* v = p.values(batch, head) + d;

  float sum = 0.f;
  for (int key = 0; key < p.kv_len; key += EDGE) {
    p_tile[y][x] = query < p.q_len && key + x < p.kv_len ? row[key + x] : 0.f;
    v_tile[y][x] = d < HEAD_DIM && key + y < p.kv_len ? to_float(v[(key + y) * p.v_strides.row]) : 0.f;
    __syncthreads();
    float tile_sum = 0.f;
#pragma unroll
    for (int i = 0; i < EDGE; ++i) tile_sum += p_tile[y][i] * v_tile[i][x];
    sum += tile_sum;
    __syncthreads();
  }
  if (query < p.q_len && d < HEAD_DIM) p.out_row(batch, head, query)[d] = from_float<scalar_t>(sum);
}
