// What one warp does with a tile of keys and values (docs/math.md, eq. 5): S^T = K Q^T and O^T = V^T P^T on
// tensor cores. Keys and features are the 16 rows of m16n8k16, query rows (GROUP heads x q_len) its 8 columns,
// so that a group of up to eight heads costs one product and nothing is padded further.
//
// Defines: HEAD_DIM, GROUP, PAGE_SIZE (0: dense), COLUMN_TILES (of 8 query rows), KEYS (a tile), HEADS (key heads that a
// block reads side by side), WARPS, STAGES, scalar_t (of q and out), kv_t (of the cache: scalar_t, or u8 for
// e4m3 with a scale a head), SOFTCAP, SINKS, SETTLED.
#pragma once

#include "operands.cuh"
#include "tile_stream.cuh"

constexpr int COLUMNS = COLUMN_TILES * 8;
constexpr int KEY_TILES = KEYS / 16;
constexpr int DIM_TILES = HEAD_DIM / 16;
constexpr bool ODD = DIM_TILES % Operands::TILES;  // the last tile of features is loaded alone
constexpr float UNSEEN = -1e30f;  // the reference of a row that has seen no key
constexpr float SLACK = 8.f;      // exponents of 2 that a weight may stand above its reference

struct Params {
  const scalar_t* q;
  scalar_t* out;
  float* lse;  // may be null
  const int *seq_lens, *page_table, *cu_seqlens_q;  // DENSE: null
  const float* sinks;
  const float *k_scale, *v_scale;  // [kv_heads], or null: 1
  u8* partials;                    // cuda_paged: [blocks, KINDS] Partials, empty between launches, and a counter
  i64 q_token_stride, q_head_stride, out_token_stride, out_head_stride;
  i64 lse_row_stride, lse_head_stride;
  int batch, segments, q_len, row_blocks, table_stride, left, right;
  float scale_log2, softcap_log2, softcap_scale;
  int table_columns;
  int kv_len;  // of dense rows
};

// The query rows of one key head of a segment. Row r is token r / GROUP of the sequence, head r % GROUP of the group.
struct Rows {
  int first, count, kv_head, q_len;

  __device__ Rows(const Segment& s, int blocks, int key_head) {
    const int group = blocks == 1 ? s.head : s.head / blocks;
    kv_head = group * HEADS + key_head;
    first = (s.head - group * blocks) * COLUMNS;
    q_len = s.q_len;
    count = min(COLUMNS, q_len * GROUP - first);
  }
  __device__ int token(int row) const { return (first + row) / GROUP; }
  __device__ int head(int row) const { return kv_head * GROUP + (first + row) % GROUP; }
};

// What one warp knows of a segment's softmax. A lane holds columns 2 (lane % 4) + {0, 1} of each column tile.
struct State {
  float m[COLUMN_TILES][2];  // reference: near the largest score so far, in exponents of 2
  float l[COLUMN_TILES][2];  // sum of weights over this lane's keys
  float o[DIM_TILES][COLUMN_TILES][4];

  __device__ __forceinline__ void reset() {
#pragma unroll
    for (int n = 0; n < COLUMN_TILES; ++n) {
      m[n][0] = m[n][1] = UNSEEN;
      l[n][0] = l[n][1] = 0.f;
#pragma unroll
      for (int d = 0; d < DIM_TILES; ++d) o[d][n][0] = o[d][n][1] = o[d][n][2] = o[d][n][3] = 0.f;
    }
  }

  // Move the references up to `top` and rescale what was summed under the old ones.
  __device__ __forceinline__ void raise(float (&top)[COLUMN_TILES][2]) {
#pragma unroll
    for (int n = 0; n < COLUMN_TILES; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int step = 4; step < 32; step *= 2) top[n][j] = fmaxf(top[n][j], __shfl_xor_sync(~0u, top[n][j], step));
        const float raised = fmaxf(m[n][j], top[n][j]), factor = fast_exp2(m[n][j] - raised);
        m[n][j] = raised;
        l[n][j] *= factor;
#pragma unroll
        for (int d = 0; d < DIM_TILES; ++d) o[d][n][j] *= factor, o[d][n][2 + j] *= factor;
      }
  }
};

struct Queries {
  u32 b[DIM_TILES][COLUMN_TILES][2];  // q as B operands
  float scale;                        // from products to exponents of 2, or to what softcap caps

  __device__ __forceinline__ void load(const Params& p, const Segment& s, const Rows& rows) {
    scale = (SOFTCAP ? p.softcap_scale : p.scale_log2) * (p.k_scale ? p.k_scale[rows.kv_head] : 1.f);
#pragma unroll
    for (int n = 0; n < COLUMN_TILES; ++n) {
      const int row = n * 8 + threadIdx.x % 32 / 4;
      const scalar_t* q = p.q + (s.q_start + rows.token(row)) * p.q_token_stride + rows.head(row) * p.q_head_stride;
#pragma unroll
      for (int d = 0; d < DIM_TILES; ++d)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          b[d][n][half] = row < rows.count ? query_pair(q + d * 16 + Operands::k_feature(half)) : 0u;
    }
  }
};

// The keys [first, end) that a column's query sees.
struct Visible {
  int first[COLUMN_TILES][2], end[COLUMN_TILES][2];

  __device__ __forceinline__ Visible(const Params& p, const Segment& s, const Rows& rows) {
#pragma unroll
    for (int n = 0; n < COLUMN_TILES; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int position = rows.token(n * 8 + threadIdx.x % 4 * 2 + j) + s.kv_len - s.q_len;
        first[n][j] = p.left < 0 ? 0 : max(0, position - p.left);
        end[n][j] = p.right < 0 ? s.kv_len : min(s.kv_len, position + p.right + 1);
      }
  }
};

// One tile of KEYS keys, the first of them `key`. MASKED where some query does not see all of them.
template <bool MASKED>
__device__ __forceinline__ void attend_tile(const Params& p, u32 keys, u32 values, int key, const Segment& s,
                                            const Rows& rows, const Queries& q, State& state) {
  const int lane = threadIdx.x % 32;
  float scores[KEY_TILES][COLUMN_TILES][4], odd[KEY_TILES][COLUMN_TILES][4];  // two chains of products
#pragma unroll
  for (int t = 0; t < KEY_TILES; ++t) {
#pragma unroll
    for (int n = 0; n < COLUMN_TILES; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[t][n][i] = odd[t][n][i] = 0.f;
#pragma unroll
    for (int d = 0; d < DIM_TILES; d += Operands::TILES) {
      u32 a[Operands::TILES][4];
      Operands::load_keys(a, keys, t * 16, d);
#pragma unroll
      for (int i = 0; i < Operands::TILES; ++i) {
        if (ODD && d + i == DIM_TILES) break;
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; ++n)
          mma_16x8x16<mma_t>((d + i) % 2 ? odd[t][n] : scores[t][n], a[i], q.b[d + i][n][0], q.b[d + i][n][1]);
      }
    }
  }

  float top[COLUMN_TILES][2];
  bool outgrown = false;
  const Visible visible(p, s, rows);
#pragma unroll
  for (int n = 0; n < COLUMN_TILES; ++n) {
    top[n][0] = top[n][1] = UNSEEN;
#pragma unroll
    for (int t = 0; t < KEY_TILES; ++t)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& x = scores[t][n][i];
        x += odd[t][n][i];
        if (SOFTCAP) x = p.softcap_log2 * fast_tanh(x * q.scale);
        else x *= q.scale;
        if (MASKED) {
          const int at = key + t * 16 + lane / 4 + i / 2 * 8;
          if (at < visible.first[n][i % 2] || at >= visible.end[n][i % 2]) x = NEG_INF;
        }
        top[n][i % 2] = fmaxf(top[n][i % 2], x);
      }
    outgrown |= top[n][0] > state.m[n][0] + SLACK || top[n][1] > state.m[n][1] + SLACK;
  }
  if (__any_sync(~0u, outgrown)) state.raise(top);

#pragma unroll
  for (int t = 0; t < KEY_TILES; ++t) {
    u32 weights[COLUMN_TILES][2];
#pragma unroll
    for (int n = 0; n < COLUMN_TILES; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scores[t][n][i] = fast_exp2(scores[t][n][i] - state.m[n][i % 2]);
        state.l[n][i % 2] += scores[t][n][i];
      }
      weights[n][0] = transpose_matrix(pack<mma_t>(scores[t][n][0], scores[t][n][1]));
      weights[n][1] = transpose_matrix(pack<mma_t>(scores[t][n][2], scores[t][n][3]));
    }
    // Keys past the end weigh 0, but 0 * NaN is NaN: what stands there is cleared.
    u32 keep[2] = {~0u, ~0u};
    if (MASKED) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at = key + t * 16 + half * 8 + lane % 4 * 2;
        keep[half] = (at < s.kv_len ? 0xffffu : 0u) | (at + 1 < s.kv_len ? 0xffff0000u : 0u);
      }
    }
#pragma unroll
    for (int d = 0; d < DIM_TILES; d += Operands::TILES) {
      u32 a[Operands::TILES][4];
      Operands::load_values(a, values, t * 16, d);
#pragma unroll
      for (int i = 0; i < Operands::TILES; ++i) {
        if (ODD && d + i == DIM_TILES) break;
        if (MASKED) a[i][0] &= keep[0], a[i][1] &= keep[0], a[i][2] &= keep[1], a[i][3] &= keep[1];
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; ++n)
          mma_16x8x16<mma_t>(state.o[d + i][n], a[i], weights[n][0], weights[n][1]);
      }
    }
  }
}

// The tiles of `stream` up to `end`, all of one segment.
template <class Stream>
__device__ __forceinline__ void attend_tiles(const Params& p, Stream& stream, int end, const Segment& s, const Rows& rows,
                                             const Queries& q, State& state) {
  // Keys [full_first, full_end) are seen by every row of the segment.
  const int last_position = s.kv_len - s.q_len + rows.token(max(0, rows.count - 1));
  const int first_position = s.kv_len - s.q_len + rows.token(0);
  const int full_first = p.left < 0 ? 0 : last_position - p.left;
  const int full_end = p.right < 0 ? s.kv_len : min(s.kv_len, first_position + p.right + 1);
  for (; stream.tile() < end; stream.advance()) {
    const int key = s.first_key + (stream.tile() - s.begin) * KEYS;
    stream.wait();
    if (key >= full_first && key + KEYS <= full_end)
      attend_tile<false>(p, stream.keys(), stream.values(), key, s, rows, q, state);
    else
      attend_tile<true>(p, stream.keys(), stream.values(), key, s, rows, q, state);
  }
}
