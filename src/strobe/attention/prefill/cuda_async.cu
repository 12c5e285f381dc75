// FlashAttention-2 on mma.sync (docs/math.md, eq. 5; Dao 2023, arXiv 2307.08691), for sm_80 and up.
//
// A block owns Q_TILE query rows of one key head: (token, head of the group) pairs, so that the heads of
// a group read their keys once. Its warps own Q_TILE / WARPS rows each and never exchange anything but
// the shared K and V tiles, which cp.async brings in while the tile before is worked on.
//
// Compiled for one problem's features: HEAD_DIM, GROUP, PAGE_SIZE (0: not paged), PACKED_Q, PACKED_KV,
// HAS_LEFT, HAS_RIGHT, SOFTCAP, SINKS; and one shape of tiles: Q_TILE, K_TILE, WARPS, STAGES,
// Q_IN_REGISTERS, BLOCKS_PER_SM.
#include "async_copy.cuh"
#include "kv_source.cuh"
#include "mask.cuh"
#include "mma.cuh"
#include "shared_tile.cuh"
#include "softmax.cuh"
#include "tile_order.cuh"
#include "types.cuh"

constexpr int THREADS = WARPS * 32;
constexpr int WARP_ROWS = Q_TILE / WARPS;
constexpr int M_TILES = WARP_ROWS / 16;
constexpr int K_STEPS = K_TILE / 16;
constexpr int D_STEPS = HEAD_DIM / 16;
static_assert(Q_TILE % (WARPS * 16) == 0 && K_TILE % 16 == 0 && HEAD_DIM % 16 == 0);

using Tile = SharedTile<HEAD_DIM>;
using Mask = WindowMask<HAS_LEFT, HAS_RIGHT>;
using Softmax = OnlineSoftmax<M_TILES>;
using Scores = float[M_TILES][2 * K_STEPS][4];

struct Strides {
  i64 batch, row, head;  // in elements; `batch` is 0 for a packed tensor, and the pages' for a paged one

  // The first element of a head in a sequence that starts at row `start` of its batch.
  __device__ __forceinline__ i64 head_at(int at_batch, int start, int at_head) const {
    return at_batch * batch + start * row + at_head * head;
  }
};

struct Params {
  const scalar_t *q, *k, *v;
  scalar_t* out;
  float* lse;                                        // null: not wanted
  const float* sinks;                                // [q_heads]
  const int *cu_seqlens_q, *cu_seqlens_kv;           // [batch + 1]
  const int *seq_lens, *page_table;                  // [batch], [batch, pages_per_row]
  Strides q_strides, k_strides, v_strides, out_strides;
  i64 lse_batch_stride, lse_head_stride;
  int q_len, kv_len, kv_heads, pages_per_row;
  int q_tiles, sequences, section;                   // TileOrder's, over the batch x kv_heads sequences of keys
  int left, right;
  float scale_log2;                                  // with SOFTCAP: softcap x log2(e)
  float softcap_scale;                               // scale / softcap
};

#if PAGE_SIZE
using KeyRows = PagedRows<scalar_t, PAGE_SIZE>;
#else
using KeyRows = StridedRows<scalar_t>;
#endif

// The tile that a block works on: `rows` (token, head of the group) pairs of one sequence and key head,
// Q_TILE of them from `first_row` on. It is the same for all threads and stands in shared memory, because
// the main loop has no registers to spare.
struct Block {
  const scalar_t *q, *k, *v;  // the first row of this sequence and head
  const int* pages;
  Mask mask;
  KeyTiles tiles;
  int batch, kv_head, q_start, rows, first_row;
  int load_end;  // keys from here on are not read

  __device__ __forceinline__ void find(const Params& p) {
    const auto [sequence, q_tile] = TileOrder{p.q_tiles, p.sequences, p.section}.at(blockIdx.x);
    batch = sequence / p.kv_heads, kv_head = sequence % p.kv_heads;
    q_start = PACKED_Q ? p.cu_seqlens_q[batch] : 0;
    const int q_len = PACKED_Q ? p.cu_seqlens_q[batch + 1] - q_start : p.q_len;
    const int kv_start = PACKED_KV ? p.cu_seqlens_kv[batch] : 0;
    const int kv_len = PAGE_SIZE ? p.seq_lens[batch] : PACKED_KV ? p.cu_seqlens_kv[batch + 1] - kv_start : p.kv_len;
    rows = q_len * GROUP, first_row = q_tile * Q_TILE;
    mask = {kv_len, kv_len - q_len, p.left, p.right};
    tiles = KeyTiles::of<K_TILE>(mask, first_row / GROUP, (min(first_row + Q_TILE, rows) - 1) / GROUP);
    load_end = min(kv_len, tiles.end * K_TILE);
    q = p.q + p.q_strides.head_at(batch, q_start, kv_head * GROUP);
    k = p.k + p.k_strides.head_at(PAGE_SIZE ? 0 : batch, kv_start, kv_head);
    v = p.v + p.v_strides.head_at(PAGE_SIZE ? 0 : batch, kv_start, kv_head);
    pages = p.page_table + i64(batch) * p.pages_per_row;
  }

  __device__ __forceinline__ KeyRows key_rows(const scalar_t* first, const Strides& strides) const {
#if PAGE_SIZE
    return {first, strides.batch, strides.row, pages};
#else
    return {first, strides.row};
#endif
  }
};

// What one warp keeps in registers: its queries' weighted sums, their softmax, where its lanes read.
struct Warp {
  u32 q_lane, k_lane, v_lane;  // ldmatrix addresses: the warp's first rows of Q, of a K and of a V tile at 0
#if Q_IN_REGISTERS
  u32 q[D_STEPS][M_TILES][4];
#endif
  float out[M_TILES][2 * D_STEPS][4];
  Softmax softmax;

  __device__ __forceinline__ Warp(u32 q_rows) {
    const int lane = threadIdx.x % 32;
    q_lane = q_rows + Tile::offset(lane % 16, lane / 16);
    k_lane = Tile::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
    v_lane = Tile::offset(lane % 16, lane / 16);
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
      for (int d = 0; d < 2 * D_STEPS; ++d)
#pragma unroll
        for (int i = 0; i < 4; ++i) out[m][d][i] = 0.0f;
  }

  __device__ __forceinline__ void read_queries(int d, u32 (&a)[M_TILES][4]) const {
#pragma unroll
    for (int m = 0; m < M_TILES; ++m) load_matrices(a[m], Tile::advance(q_lane, d) + m * 16 * Tile::ROW_BYTES);
  }

#if Q_IN_REGISTERS
  __device__ __forceinline__ void keep_queries() {
#pragma unroll
    for (int d = 0; d < D_STEPS; ++d) read_queries(d, q[d]);
  }
#endif

  // The A operands of mma step `d`.
  __device__ __forceinline__ void queries(int d, u32 (&a)[M_TILES][4]) const {
#if Q_IN_REGISTERS
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) a[m][i] = q[d][m][i];
#else
    read_queries(d, a);
#endif
  }

  // scores = Q Kᵀ over the tile of keys at `keys` (docs/math.md, equation 1, without its scale).
  // `beside(part, parts)` is work to be done between the products.
  template <typename Beside>
  __device__ __forceinline__ void score(u32 keys, Scores& scores, const Beside& beside) const {
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
      for (int n = 0; n < 2 * K_STEPS; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[m][n][i] = 0.0f;
#if Q_IN_REGISTERS  // 32 keys at a time, so that the maxima of the first are taken beside the products of the next
    constexpr int N_STEP = K_STEPS % 2 ? K_STEPS : 2;
#else  // all keys at once, so that each query is read once
    constexpr int N_STEP = K_STEPS;
#endif
#pragma unroll
    for (int start = 0; start < K_STEPS; start += N_STEP)
#pragma unroll
      for (int d = 0; d < D_STEPS; ++d) {
        u32 a[M_TILES][4];
        queries(d, a);
#pragma unroll
        for (int n = start; n < start + N_STEP; ++n) {
          u32 b[4];
          load_matrices(b, Tile::advance(keys + k_lane, d) + n * 16 * Tile::ROW_BYTES);
#pragma unroll
          for (int m = 0; m < M_TILES; ++m) {
            mma_16x8x16<scalar_t>(scores[m][2 * n], a[m], b[0], b[1]);
            mma_16x8x16<scalar_t>(scores[m][2 * n + 1], a[m], b[2], b[3]);
          }
        }
        beside(start / N_STEP * D_STEPS + d, K_STEPS / N_STEP * D_STEPS);
      }
  }

  // out += exp(scores) V over the tile of values at `values` (equation 5)
  __device__ __forceinline__ void accumulate(u32 values, const Scores& scores, float scale) {
    softmax.observe(scores, scale, out);
#pragma unroll
    for (int n = 0; n < K_STEPS; ++n) {
      u32 a[M_TILES][4];
#pragma unroll
      for (int m = 0; m < M_TILES; ++m)
        softmax.weights<scalar_t>(m, scores[m][2 * n], scores[m][2 * n + 1], scale, a[m]);
#pragma unroll
      for (int d = 0; d < D_STEPS; ++d) {
        u32 b[4];
        load_matrices_transposed(b, Tile::advance(values + v_lane, d) + n * 16 * Tile::ROW_BYTES);
#pragma unroll
        for (int m = 0; m < M_TILES; ++m) {
          mma_16x8x16<scalar_t>(out[m][2 * d], a[m], b[0], b[1]);
          mma_16x8x16<scalar_t>(out[m][2 * d + 1], a[m], b[2], b[3]);
        }
      }
    }
  }
};

// softcap x tanh(score / softcap), up to the factor that `scale_log2` holds (equation 4)
__device__ __forceinline__ void cap_scores(Scores& scores, float softcap_scale) {
#pragma unroll
  for (int m = 0; m < M_TILES; ++m)
#pragma unroll
    for (int n = 0; n < 2 * K_STEPS; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[m][n][i] = fast_tanh(scores[m][n][i] * softcap_scale);
}

// Hide the keys outside each row's window. `row` is the warp's first row, `key` the tile's first key.
__device__ __forceinline__ void mask_scores(Scores& scores, const Mask& mask, int row, int key) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < M_TILES; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = (row + m * 16 + half * 8 + lane / 4) / GROUP;
      const int end = mask.end(token) - key - lane % 4 * 2, first = mask.first(token) - key - lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < 2 * K_STEPS; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          if (8 * n + i >= end || (HAS_LEFT && 8 * n + i < first)) scores[m][n][2 * half + i] = NEG_INF;
    }
}

// out / sum, and lse. They go through the warp's own rows of Q's shared memory, to leave in 16-byte pieces.
__device__ __forceinline__ void write(const Params& p, const Block& block, Warp& warp, unsigned char* q_shared) {
  const int lane = threadIdx.x % 32, warp_first = threadIdx.x / 32 * WARP_ROWS, warp_row = block.first_row + warp_first;
  unsigned char* staging = q_shared + warp_first * Tile::ROW_BYTES;
  const i64 lse_at = PACKED_Q ? block.q_start : block.batch * p.lse_batch_stride;
  warp.softmax.finish();
#pragma unroll
  for (int m = 0; m < M_TILES; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int local = m * 16 + half * 8 + lane / 4, row = warp_row + local;
      const int head = block.kv_head * GROUP + row % GROUP;
      const float sum = warp.softmax.sum[m][half];
      float log2_sum = warp.softmax.shift(m, half) + fast_log2(sum);
      float factor = sum == 0.0f ? 0.0f : fast_reciprocal(sum);
#if SINKS
      const float sink = p.sinks[row < block.rows ? head : 0] * LOG2E;
      const float top = fmaxf(log2_sum, sink);
      const float with_sink =
          top == NEG_INF ? NEG_INF : top + fast_log2(fast_exp2(log2_sum - top) + fast_exp2(sink - top));
      if (sum != 0.0f) factor *= fast_exp2(log2_sum - with_sink);
      log2_sum = with_sink;
#endif
      if (p.lse && lane % 4 == 0 && row < block.rows)
        p.lse[lse_at + head * p.lse_head_stride + row / GROUP] = log2_sum * LN2;
#pragma unroll
      for (int d = 0; d < 2 * D_STEPS; ++d)
        *reinterpret_cast<u32*>(staging + Tile::offset(local, d) + lane % 4 * 4) =
            pack<scalar_t>(warp.out[m][d][2 * half] * factor, warp.out[m][d][2 * half + 1] * factor);
    }
  __syncwarp();
  scalar_t* out = p.out + p.out_strides.head_at(block.batch, block.q_start, block.kv_head * GROUP);
#pragma unroll
  for (int i = lane; i < WARP_ROWS * Tile::CHUNKS; i += 32) {
    const int local = i / Tile::CHUNKS, chunk = i % Tile::CHUNKS, row = warp_row + local;
    if (row >= block.rows) break;
    *reinterpret_cast<uint4*>(out + row / GROUP * p.out_strides.row + row % GROUP * p.out_strides.head + chunk * 8) =
        *reinterpret_cast<const uint4*>(staging + Tile::offset(local, chunk));
  }
}

constexpr int K_BYTES = K_TILE * Tile::ROW_BYTES, STAGE_BYTES = 2 * K_BYTES;
// Copies issued together share their addresses, and wait once for the page table; spread over the products of
// a long head_dim they hide under them. Measured on an H200: 4 % for the first at 128, 5 % for the second at 256.
constexpr bool COPY_AT_ONCE = HEAD_DIM <= 128 || PAGE_SIZE;

// The copy of one tile of keys and values into a stage.
struct TileCopy {
  KeyRows keys, values;
  int key, end;
  u32 stage;

  __device__ __forceinline__ TileCopy(const Params& p, const Block& block, int tile, u32 stage)
      : keys(block.key_rows(block.k, p.k_strides)),
        values(block.key_rows(block.v, p.v_strides)),
        key(tile * K_TILE),
        end(block.load_end),
        stage(stage) {}

  // Start part `part` of `parts`. Rows past the end become zeros, so that no NaN that stands there meets
  // a weight of 0.
  __device__ __forceinline__ void part(int part, int parts) const {
    constexpr int PASSES = Tile::PASSES<K_TILE, THREADS>;
#pragma unroll
    for (int pass = PASSES * part / parts; pass < PASSES * (part + 1) / parts; ++pass)
      Tile::visit<K_TILE, THREADS>(pass, [&](int row, int chunk) {
        const bool valid = key + row < end;
        const u32 to = stage + Tile::offset(row, chunk);
        copy_async_16(to, keys.at(key + row, valid) + chunk * 8, valid);
        copy_async_16(to + K_BYTES, values.at(key + row, valid) + chunk * 8, valid);
      });
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) attend(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) unsigned char shared[];  // Q, then STAGES pairs of a K and a V tile, used in turn
  __shared__ Block block;
  if (threadIdx.x == 0) block.find(p);
  __syncthreads();
  if (block.first_row >= block.rows) return;

  const u32 q_shared = shared_address(shared), stages = q_shared + Q_TILE * Tile::ROW_BYTES;
  const GroupedRows<scalar_t, GROUP> queries{block.q, p.q_strides.row, p.q_strides.head};
#pragma unroll
  for (int pass = 0; pass < Tile::PASSES<Q_TILE, THREADS>; ++pass)
    Tile::visit<Q_TILE, THREADS>(pass, [&](int row, int chunk) {
      const bool valid = block.first_row + row < block.rows;
      copy_async_16(q_shared + Tile::offset(row, chunk), queries.at(block.first_row + row, valid) + chunk * 8, valid);
    });
#pragma unroll
  for (int ahead = 0; ahead < STAGES - 1; ++ahead) {
    TileCopy(p, block, block.tiles.begin + ahead, stages + ahead * STAGE_BYTES).part(0, 1);
    commit_copies();
  }

  const int warp_first = threadIdx.x / 32 * WARP_ROWS;
  Warp warp(q_shared + warp_first * Tile::ROW_BYTES);
#if Q_IN_REGISTERS
  wait_copies<STAGES - 2>();
  __syncthreads();
  warp.keep_queries();
#endif

  int done = 0;  // tiles
  auto walk = [&](int KeyTiles::*until, auto masked) {
    for (; done < block.tiles.*until - block.tiles.begin; ++done) {
      wait_copies<STAGES - 2>();
      __syncthreads();  // the tile is here, and every warp is done with the stage that is loaded next
      const int tile = block.tiles.begin + done;
      const u32 stage = stages + done % STAGES * STAGE_BYTES;
      const TileCopy next(p, block, tile + STAGES - 1, stages + (done + STAGES - 1) % STAGES * STAGE_BYTES);
      const int key = tile * K_TILE;
      const int row = block.first_row + warp_first, last_row = min(row + WARP_ROWS, block.rows) - 1;
      if (row > last_row || (masked && (key >= block.mask.end(last_row / GROUP) ||
                                        key + K_TILE <= block.mask.first(row / GROUP)))) {
        next.part(0, 1);  // this warp has nothing to do here but its share of the copies
        commit_copies();
        continue;
      }
      Scores scores;
      warp.score(stage, scores, [&](int part, int parts) {
        if (COPY_AT_ONCE && part == 0) next.part(0, 1);
        if (!COPY_AT_ONCE) next.part(part, parts);
      });
      commit_copies();
      if (SOFTCAP) cap_scores(scores, p.softcap_scale);
      if (masked) mask_scores(scores, block.mask, row, key);
      warp.accumulate(stage + K_BYTES, scores, p.scale_log2);
    }
  };
  struct Yes { __device__ constexpr operator bool() const { return true; } };
  struct No { __device__ constexpr operator bool() const { return false; } };
  if (HAS_LEFT) walk(&KeyTiles::full_begin, Yes{});
  walk(&KeyTiles::full_end, No{});
  walk(&KeyTiles::end, Yes{});

  wait_copies<0>();  // where there was no key at all, Q's copy may still be under way
  __syncthreads();
  if (block.first_row + warp_first < block.rows) write(p, block, warp, shared);
}
