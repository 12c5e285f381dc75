// FlashAttention in one kernel, a warp a group of queries (docs/math.md, eq. 5).
//
// A thread alone does one multiply-add for each element it reads from shared memory. Here a warp owns
// 4 ROWS queries, and its lanes split the work as a 4 x 8 grid: lane (g, c) computes the scores of ROWS
// queries against K_TILE / 8 keys, and the output of the same queries in HEAD_DIM / 8 columns. Each value
// read serves ROWS multiply-adds or more, so the arithmetic units wait less for shared memory.
//
//   lane (g, c):  queries 4 i + g, i < ROWS;   keys c + 8 j;   columns 4 (c + 8 n) .. + 3
#include "dense.cuh"
#include "reduce.cuh"

constexpr int WARPS = 4, THREADS = 32 * WARPS;
constexpr int ROWS = Q_TILE / (4 * WARPS);  // queries of a lane
constexpr int KEYS = K_TILE / 8;            // keys of a lane
constexpr int QUADS = HEAD_DIM / 32;        // columns of a lane, in fours
constexpr int PITCH = HEAD_DIM + 4;         // rows 16 bytes apart modulo the 128 of all banks
static_assert(Q_TILE % (16 * WARPS) == 0 && K_TILE % 8 == 0 && HEAD_DIM % 32 == 0);

__device__ __forceinline__ const float4& four(const float* p) { return *reinterpret_cast<const float4*>(p); }

// Rows [first, first + COUNT) of `rows` times `scale` as float32; zeros past the last one.
template <int COUNT, int PITCH>
__device__ __forceinline__ void load_tile(float* tile, const scalar_t* rows, i64 stride, int first, int end,
                                          float scale) {
  constexpr int CHUNKS = HEAD_DIM / VEC<scalar_t>;
  for (int at = threadIdx.x; at < COUNT * CHUNKS; at += THREADS) {
    const int row = at / CHUNKS, d = at % CHUNKS * VEC<scalar_t>;
    float x[VEC<scalar_t>] = {};
    if (first + row < end) load_floats(rows + (first + row) * stride + d, x);
#pragma unroll
    for (int i = 0; i < VEC<scalar_t>; i += 4)
      *reinterpret_cast<float4*>(&tile[row * PITCH + d + i]) =
          make_float4(x[i] * scale, x[i + 1] * scale, x[i + 2] * scale, x[i + 3] * scale);
  }
}

// grid (q_len / Q_TILE, q_heads, batch)
extern "C" __global__ void __launch_bounds__(THREADS) attend(const __grid_constant__ DenseParams p) {
  extern __shared__ float4 shared[];
  float* q_tile = reinterpret_cast<float*>(shared);  // [Q_TILE][PITCH]
  float* k_tile = q_tile + Q_TILE * PITCH;           // [K_TILE][PITCH]
  float* v_tile = k_tile + K_TILE * PITCH;           // [K_TILE][HEAD_DIM]
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 8, c = threadIdx.x % 8;
  float* weights = v_tile + K_TILE * HEAD_DIM + warp * K_TILE * 4 * ROWS;  // [K_TILE][4][ROWS], the warp's own
  const int head = blockIdx.y, batch = blockIdx.z;
  const int first_query = longest_first() * Q_TILE, warp_query = first_query + warp * 4 * ROWS;
  const float* my_q = q_tile + (warp * 4 * ROWS + g) * PITCH;
  const scalar_t* keys = p.keys(batch, head);
  const scalar_t* values = p.values(batch, head);
  load_tile<Q_TILE, PITCH>(q_tile, p.queries(batch, head), p.q_strides.row, first_query, p.q_len, p.scale_log2e);

  float4 out[ROWS][QUADS] = {};
  float maximum[ROWS], sum[ROWS] = {};  // sum: over this lane's keys only, until the end
  int visible[ROWS];
#pragma unroll
  for (int i = 0; i < ROWS; ++i) maximum[i] = NEG_INF, visible[i] = p.visible(warp_query + 4 * i + g);

  const int end = p.visible(min(first_query + Q_TILE, p.q_len) - 1);
  for (int first = 0; first < end; first += K_TILE) {
    __syncthreads();
    load_tile<K_TILE, PITCH>(k_tile, keys, p.k_strides.row, first, p.kv_len, 1.f);
    load_tile<K_TILE, HEAD_DIM>(v_tile, values, p.v_strides.row, first, p.kv_len, 1.f);
    __syncthreads();

    float s[ROWS][KEYS] = {};  // eq. 1, in base two
#pragma unroll 2
    for (int d = 0; d < HEAD_DIM; d += 4) {
      float4 k[KEYS];
#pragma unroll
      for (int j = 0; j < KEYS; ++j) k[j] = four(&k_tile[(c + 8 * j) * PITCH + d]);
#pragma unroll
      for (int i = 0; i < ROWS; ++i) {
        const float4 q = four(&my_q[4 * i * PITCH + d]);
#pragma unroll
        for (int j = 0; j < KEYS; ++j) s[i][j] += q.x * k[j].x + q.y * k[j].y + q.z * k[j].z + q.w * k[j].w;
      }
    }

#pragma unroll
    for (int i = 0; i < ROWS; ++i) {  // eq. 5; the eight lanes of a row agree on its maximum
      float highest = maximum[i];
#pragma unroll
      for (int j = 0; j < KEYS; ++j) {
        if (first + c + 8 * j >= visible[i]) s[i][j] = NEG_INF;
        highest = fmaxf(highest, s[i][j]);
      }
      highest = warp_max<8>(highest);
      const float alpha = rescale_factor(maximum[i], highest);
      maximum[i] = highest, sum[i] *= alpha;
#pragma unroll
      for (int j = 0; j < KEYS; ++j) {
        const float weight = fast_exp2(s[i][j] - finite(highest));
        weights[((c + 8 * j) * 4 + g) * ROWS + i] = weight;
        sum[i] += weight;
      }
#pragma unroll
      for (int n = 0; n < QUADS; ++n)
        out[i][n].x *= alpha, out[i][n].y *= alpha, out[i][n].z *= alpha, out[i][n].w *= alpha;
    }
    __syncwarp();

#pragma unroll 2
    for (int key = 0; key < K_TILE; ++key) {
      float weight[ROWS];
#pragma unroll
      for (int i = 0; i < ROWS; ++i) weight[i] = weights[(key * 4 + g) * ROWS + i];
#pragma unroll
      for (int n = 0; n < QUADS; ++n) {
        const float4 v = four(&v_tile[key * HEAD_DIM + 4 * (c + 8 * n)]);
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
          out[i][n].x += weight[i] * v.x, out[i][n].y += weight[i] * v.y;
          out[i][n].z += weight[i] * v.z, out[i][n].w += weight[i] * v.w;
        }
      }
    }
  }

#pragma unroll
  for (int i = 0; i < ROWS; ++i) {
    const int query = warp_query + 4 * i + g;
    const float total = warp_sum<8>(sum[i]), normal = total > 0.f ? 1.f / total : 0.f;
    if (query >= p.q_len) continue;
    scalar_t* row = p.out_row(batch, head, query);
#pragma unroll
    for (int n = 0; n < QUADS; ++n) {
      const int d = 4 * (c + 8 * n);
      row[d] = from_float<scalar_t>(out[i][n].x * normal), row[d + 1] = from_float<scalar_t>(out[i][n].y * normal);
      row[d + 2] = from_float<scalar_t>(out[i][n].z * normal), row[d + 3] = from_float<scalar_t>(out[i][n].w * normal);
    }
    if (p.lse && c == 0) p.lse[p.lse_index(batch, head, query)] = log_sum_exp(maximum[i], total);
  }
}
