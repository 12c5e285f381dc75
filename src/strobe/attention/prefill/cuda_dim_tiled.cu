// FlashAttention with head_dim in tiles (docs/math.md, eq. 7), so that any head_dim fits 48 KiB of shared memory.
//
// Only QK_TILE columns of Q and K, then PV_TILE columns of V, are in shared memory at a time: scores sum over
// the first before their softmax, the output takes one tile of columns after another. What must stay is the
// output, in registers: warps hold Q_TILE x HEAD_DIM of it as a grid of DOWN x ACROSS warps, 16 rows and
// HEAD_DIM / ACROSS columns each. Keys are shared out over the same grid, so warps side by side agree on their
// rows' maxima, and exchange weights, through shared memory.
#include "dense.cuh"
#include "warp_attention.cuh"

constexpr int WARPS = HEAD_DIM <= 128 ? 4 : 8, THREADS = 32 * WARPS;
constexpr int ACROSS = HEAD_DIM <= 256 ? 1 : HEAD_DIM <= 512 ? 2 : 4;  // 128 output registers a lane at most
constexpr int DOWN = WARPS / ACROSS;
constexpr int Q_TILE = 16 * DOWN;
constexpr int KEYS = K_TILE / ACROSS;      // keys of a warp
constexpr int COLUMNS = PV_TILE / ACROSS;  // output columns of a warp, of each V tile
static_assert(HEAD_DIM % QK_TILE == 0 && HEAD_DIM % PV_TILE == 0, "head_dim is whole tiles");
static_assert(QK_TILE % 16 == 0 && KEYS % 16 == 0 && COLUMNS % 16 == 0, "warps work on 16 x 16 tiles");

using QTile = PaddedTile<Q_TILE, QK_TILE>;
using KTile = PaddedTile<K_TILE, QK_TILE>;
using VTile = PaddedTile<K_TILE, PV_TILE>;
using WeightTile = PaddedTile<Q_TILE, K_TILE>;
constexpr int LOADED = QTile::BYTES + KTile::BYTES > VTile::BYTES ? QTile::BYTES + KTile::BYTES : VTile::BYTES;

// Up to 128, registers for four blocks an SM: one has nothing to do while its tiles load.
constexpr int BLOCKS_PER_SM = HEAD_DIM <= 128 ? 4 : 1;

// grid (q_len / Q_TILE, q_heads, batch)
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) attend(const __grid_constant__ DenseParams p) {
  __shared__ uint4 loaded[LOADED / 16];  // a Q and a K tile, or a V tile
  __shared__ uint4 shared_weights[WeightTile::BYTES / 16];
  __shared__ float shared_rows[ACROSS][Q_TILE];  // a float a row from each warp across it
  scalar_t* q_tile = reinterpret_cast<scalar_t*>(loaded);
  scalar_t* k_tile = q_tile + QTile::BYTES / 2;
  scalar_t* v_tile = q_tile;
  scalar_t* weights = reinterpret_cast<scalar_t*>(shared_weights);

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, head = blockIdx.y, batch = blockIdx.z;
  const int down = warp / ACROSS, across = warp % ACROSS;
  const int first_query = longest_first() * Q_TILE;
  const int row = 16 * down + lane / 4;   // in the tile; and row + 8
  const int column = lane % 4 * 2;
  const scalar_t* queries = p.queries(batch, head);
  const scalar_t* keys = p.keys(batch, head);
  const scalar_t* values = p.values(batch, head);

  float out[HEAD_DIM / PV_TILE][COLUMNS / 8][4] = {};
  float maximum[2] = {NEG_INF, NEG_INF}, sum[2] = {};  // sum: over this lane's keys only, until the end
  const int visible[2] = {p.visible(first_query + row), p.visible(first_query + row + 8)};
  const int end = p.visible(min(first_query + Q_TILE, p.q_len) - 1);

  for (int first = 0; first < end; first += K_TILE) {
    float s[KEYS / 8][4] = {};  // eq. 1, a tile of head_dim at a time
    for (int d = 0; d < HEAD_DIM; d += QK_TILE) {
      __syncthreads();
      QTile::load<THREADS>(q_tile, queries + d, p.q_strides.row, first_query, p.q_len);
      KTile::load<THREADS>(k_tile, keys + d, p.k_strides.row, first, p.kv_len);
      __syncthreads();
#pragma unroll
      for (int step = 0; step < QK_TILE; step += 16) {
        u32 q[4];
        load_matrices(q, shared_address(q_tile + 16 * down * QTile::PITCH + step + down_then_along(QTile::PITCH)));
        multiply_rows<scalar_t>(s, q, k_tile + across * KEYS * KTile::PITCH + step, KTile::PITCH);
      }
    }

    float highest[2] = {maximum[0], maximum[1]};  // eq. 5
#pragma unroll
    for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = first + across * KEYS + 8 * n + column + i % 2;
        s[n][i] = key < visible[i / 2] ? s[n][i] * p.scale_log2e : NEG_INF;
        highest[i / 2] = fmaxf(highest[i / 2], s[n][i]);
      }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      highest[half] = warp_max<4>(highest[half]);
      if (ACROSS > 1) shared_rows[across][row + 8 * half] = highest[half];
    }
    if (ACROSS > 1) __syncthreads();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (ACROSS > 1)
#pragma unroll
        for (int other = 0; other < ACROSS; ++other)
          highest[half] = fmaxf(highest[half], shared_rows[other][row + 8 * half]);
      const float alpha = rescale_factor(maximum[half], highest[half]);
      maximum[half] = highest[half], sum[half] *= alpha;
#pragma unroll
      for (int tile = 0; tile < HEAD_DIM / PV_TILE; ++tile)
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; ++n) out[tile][n][2 * half] *= alpha, out[tile][n][2 * half + 1] *= alpha;
    }
#pragma unroll
    for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float left = fast_exp2(s[n][2 * half] - finite(maximum[half]));
        const float right = fast_exp2(s[n][2 * half + 1] - finite(maximum[half]));
        sum[half] += left + right;
        scalar_t* at = weights + (row + 8 * half) * WeightTile::PITCH + across * KEYS + 8 * n + column;
        *reinterpret_cast<u32*>(at) = pack<scalar_t>(left, right);
      }
    }

#pragma unroll
    for (int tile = 0; tile < HEAD_DIM / PV_TILE; ++tile) {  // eq. 3, a tile of columns at a time
      __syncthreads();
      VTile::load<THREADS>(v_tile, values + tile * PV_TILE, p.v_strides.row, first, p.kv_len);
      __syncthreads();
#pragma unroll
      for (int key = 0; key < K_TILE; key += 16) {
        u32 w[4];
        const scalar_t* corner = weights + 16 * down * WeightTile::PITCH + key;
        load_matrices(w, shared_address(corner + down_then_along(WeightTile::PITCH)));
        multiply_columns<scalar_t>(out[tile], w, v_tile + key * VTile::PITCH + across * COLUMNS, VTile::PITCH);
      }
    }
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    sum[half] = warp_sum<4>(sum[half]);
    if (ACROSS > 1) {
      __syncthreads();
      shared_rows[across][row + 8 * half] = sum[half];
      __syncthreads();
      sum[half] = 0.f;
#pragma unroll
      for (int other = 0; other < ACROSS; ++other) sum[half] += shared_rows[other][row + 8 * half];
    }
    const int query = first_query + row + 8 * half;
    if (query >= p.q_len) continue;
    const float normal = sum[half] > 0.f ? 1.f / sum[half] : 0.f;
    scalar_t* to = p.out_row(batch, head, query) + across * COLUMNS + column;
#pragma unroll
    for (int tile = 0; tile < HEAD_DIM / PV_TILE; ++tile)
#pragma unroll
      for (int n = 0; n < COLUMNS / 8; ++n)
        *reinterpret_cast<u32*>(to + tile * PV_TILE + 8 * n) =
            pack<scalar_t>(out[tile][n][2 * half] * normal, out[tile][n][2 * half + 1] * normal);
    if (p.lse && across == 0 && lane % 4 == 0)
      p.lse[p.lse_index(batch, head, query)] = log_sum_exp(maximum[half], sum[half]);
  }
}
