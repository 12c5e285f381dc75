// FlashAttention on tensor cores (docs/math.md, eq. 5; Dao 2023, FlashAttention-2): a warp 16 queries.
//
// Both products are mma.sync of 16-bit operands with float32 accumulation, about 15 times the rate of
// float32 multiply-adds. The weights of one product become the operand of the next without leaving their
// registers, so nothing but K and V goes through shared memory.
#include "dense.cuh"
#include "warp_attention.cuh"

constexpr int WARPS = Q_TILE / 16, THREADS = 32 * WARPS;
using Tile = PaddedTile<K_TILE, HEAD_DIM>;

// grid (q_len / Q_TILE, q_heads, batch); shared memory: K and V tiles, before them the queries in their place
extern "C" __global__ void __launch_bounds__(THREADS) attend(const __grid_constant__ DenseParams p) {
  extern __shared__ uint4 shared[];
  scalar_t* k_tile = reinterpret_cast<scalar_t*>(shared);
  scalar_t* v_tile = k_tile + K_TILE * Tile::PITCH;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, head = blockIdx.y, batch = blockIdx.z;
  const int first_query = longest_first() * Q_TILE;
  const scalar_t* keys = p.keys(batch, head);
  const scalar_t* values = p.values(batch, head);

  using QTile = PaddedTile<Q_TILE, HEAD_DIM>;
  QTile::load<THREADS>(k_tile, p.queries(batch, head), p.q_strides.row, first_query, p.q_len);
  __syncthreads();
  WarpQueries<scalar_t, HEAD_DIM, K_TILE> warp_queries(k_tile + 16 * warp * QTile::PITCH);

  const int row = first_query + 16 * warp + lane / 4;
  const int visible[2] = {p.visible(row), p.visible(row + 8)};
  const int end = p.visible(min(first_query + Q_TILE, p.q_len) - 1);
  for (int first = 0; first < end; first += K_TILE) {
    __syncthreads();
    Tile::load<THREADS>(k_tile, keys, p.k_strides.row, first, p.kv_len);
    Tile::load<THREADS>(v_tile, values, p.v_strides.row, first, p.kv_len);
    __syncthreads();
    warp_queries.attend(k_tile, v_tile, p.scale_log2e, {visible[0] - first, visible[1] - first});
  }

  warp_queries.finish();
  warp_queries.write(p, batch, head, row);
}
