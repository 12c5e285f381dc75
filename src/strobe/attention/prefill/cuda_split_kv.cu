// FlashAttention with the keys split over blocks, in two kernels (docs/math.md, eq. 6; Flash-Decoding).
//
//   partials  each block attends to its own share of the keys and leaves (O, m, l), unnormalised, in a workspace;
//             one that has all keys writes the answer instead
//   merge     each row's parts are rescaled to their common maximum and summed
//
// A grid of q_tiles x heads x batch blocks leaves SMs idle where queries are few. Split SPLITS ways it fills
// them, at the price of a workspace of splits x queries x (head_dim + 2) floats. One way needs none, and no merge.
#include "dense.cuh"
#include "warp_attention.cuh"

constexpr int WARPS = Q_TILE / 16, THREADS = 32 * WARPS;
using Tile = PaddedTile<K_TILE, HEAD_DIM>;

struct Workspace {
  float* out;              // [splits, batch, q_heads, q_len, HEAD_DIM], not written where the sum is 0
  float *maximum, *sum;    // [splits, batch, q_heads, q_len]
  int splits, keys;        // keys of a split, a multiple of K_TILE
  i64 rows;                // batch x q_heads x q_len
};

// grid (q_len / Q_TILE x splits, q_heads, batch)
extern "C" __global__ void __launch_bounds__(THREADS)
partials(const __grid_constant__ DenseParams p, const __grid_constant__ Workspace w) {
  extern __shared__ uint4 shared[];
  scalar_t* k_tile = reinterpret_cast<scalar_t*>(shared);
  scalar_t* v_tile = k_tile + K_TILE * Tile::PITCH;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, head = blockIdx.y, batch = blockIdx.z;
  const int split = longest_first() % w.splits, first_query = longest_first() / w.splits * Q_TILE;
  const scalar_t* keys = p.keys(batch, head);
  const scalar_t* values = p.values(batch, head);

  using QTile = PaddedTile<Q_TILE, HEAD_DIM>;
  QTile::load<THREADS>(k_tile, p.queries(batch, head), p.q_strides.row, first_query, p.q_len);
  __syncthreads();
  WarpQueries<scalar_t, HEAD_DIM, K_TILE> warp_queries(k_tile + 16 * warp * QTile::PITCH);

  const int row = first_query + 16 * warp + lane / 4;
  const int visible[2] = {p.visible(row), p.visible(row + 8)};
  const int begin = split * w.keys;
  const int end = min(begin + w.keys, p.visible(min(first_query + Q_TILE, p.q_len) - 1));
  for (int first = begin; first < end; first += K_TILE) {
    __syncthreads();
    Tile::load<THREADS>(k_tile, keys, p.k_strides.row, first, p.kv_len);
    Tile::load<THREADS>(v_tile, values, p.v_strides.row, first, p.kv_len);
    __syncthreads();
    warp_queries.attend(k_tile, v_tile, p.scale_log2e, {visible[0] - first, visible[1] - first});
  }

  warp_queries.finish();
  if (w.splits == 1) {
    warp_queries.write(p, batch, head, row);
    return;
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int query = row + 8 * half;
    if (query >= p.q_len) continue;
    const i64 at = split * w.rows + p.lse_index(batch, head, query);
    if (lane % 4 == 0) w.maximum[at] = warp_queries.maximum[half], w.sum[at] = warp_queries.sum[half];
    if (warp_queries.sum[half] == 0.f) continue;
    float2* out = reinterpret_cast<float2*>(w.out + at * HEAD_DIM) + lane % 4;
#pragma unroll
    for (int n = 0; n < HEAD_DIM / 8; ++n)
      out[4 * n] = make_float2(warp_queries.out[n][2 * half], warp_queries.out[n][2 * half + 1]);
  }
}

// A warp a row, an output element a lane at a time. grid: rows / (blockDim / 32)
extern "C" __global__ void merge(const __grid_constant__ DenseParams p, const __grid_constant__ Workspace w) {
  const i64 at = i64(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  if (at >= w.rows) return;
  const int lane = threadIdx.x % 32;
  const int query = at % p.q_len, head = at / p.q_len % p.q_heads, batch = at / p.q_len / p.q_heads;

  float maximum = NEG_INF, sum = 0.f;
  for (int split = 0; split < w.splits; ++split) maximum = fmaxf(maximum, w.maximum[split * w.rows + at]);
  for (int split = 0; split < w.splits; ++split)
    sum += w.sum[split * w.rows + at] * rescale_factor(w.maximum[split * w.rows + at], maximum);

  const float normal = sum > 0.f ? 1.f / sum : 0.f;
  scalar_t* row = p.out_row(batch, head, query);
  for (int d = lane; d < HEAD_DIM; d += 32) {
    float out = 0.f;
    for (int split = 0; split < w.splits; ++split) {
      const i64 part = split * w.rows + at;
      const float weight = rescale_factor(w.maximum[part], maximum);
      if (weight > 0.f) out += weight * w.out[part * HEAD_DIM + d];
    }
    row[d] = from_float<scalar_t>(out * normal);
  }
  if (p.lse && lane == 0) p.lse[at] = log_sum_exp(maximum, sum);
}
