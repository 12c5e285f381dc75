// Decode attention over a paged cache, one launch: read every key and value once, as fast as memory gives them.
//
//   1. plan      every block reads the lengths and takes its even share of all tiles (work_list.cuh)
//   2. stream    every warp keeps STAGES tiles on their way into its own ring (tile_stream.cuh)
//   3. attend    S^T = K Q^T and O^T = V^T P^T on tensor cores: keys and features are the 16 rows of
//                m16n8k16, query rows (GROUP heads x q_len) its 8 columns, so that a group of up to eight
//                heads costs one product and nothing is padded further
//   4. gather    the block's warps add up their shares of a segment (docs/math.md, eq. 6)
//   5. merge     a segment that several blocks share is added up by the last of them, in their order: same
//                inputs, same bits. Partials tell by themselves when they are there, so nobody counts or
//                fences: an empty word is a NaN that arithmetic never makes
//
// A merge waits for blocks of lower number only. That ends because blocks start in the order of their
// numbers, as every NVIDIA GPU so far has it, though CUDA does not promise it.
//
// Defines: HEAD_DIM, GROUP, PAGE_SIZE, COLUMN_TILES (of 8 query rows), KEYS (a tile), HEADS (key heads that a
// block reads side by side), WARPS, STAGES, scalar_t (of q and out), kv_t (of the cache: scalar_t, or u8 for
// e4m3 with a scale a head), SOFTCAP, SINKS.
#include "grid_dependency.cuh"
#include "memory.cuh"
#include "operands.cuh"
#include "tile_stream.cuh"
#include "work_list.cuh"

constexpr int COLUMNS = COLUMN_TILES * 8;
constexpr int KEY_TILES = KEYS / 16;
constexpr int DIM_TILES = HEAD_DIM / 16;
constexpr int GATHER_PITCH = HEAD_DIM + 4;  // floats: the four column pairs of a quad meet different banks
constexpr float UNSEEN = -1e30f;            // the reference of a row that has seen no key
constexpr float SLACK = 8.f;                // exponents of 2 that a weight may stand above its reference

using Shape = TileShape;

struct Params {
  const scalar_t* q;
  scalar_t* out;
  float* lse;  // may be null
  const int *seq_lens, *page_table, *cu_seqlens_q;
  const float* sinks;
  const float *k_scale, *v_scale;  // [kv_heads], or null: 1
  u8* partials;                    // [blocks, 2] Partials, empty between launches
  i64 q_token_stride, q_head_stride, out_token_stride, out_head_stride;
  i64 lse_row_stride, lse_head_stride;
  int batch, segments, q_len, row_blocks, table_stride, left, right;
  float scale_log2, softcap_log2, softcap_scale;
};

struct Shared {  // of the warps, for `gather`
  float o[WARPS][COLUMNS][GATHER_PITCH];
  float m[WARPS][COLUMNS], l[WARPS][COLUMNS];
  Barrier full[WARPS][STAGES];
  int scratch[WARPS];
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

// tanh to float accuracy: tanh.approx is only good to 11 bits.
__device__ __forceinline__ float tanh_exp2(float x) {
  return 1.f - __fdividef(2.f, fast_exp2(x * (2.f * LOG2E)) + 1.f);
}

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
  float scores[KEY_TILES][COLUMN_TILES][4];
#pragma unroll
  for (int t = 0; t < KEY_TILES; ++t) {
#pragma unroll
    for (int n = 0; n < COLUMN_TILES; ++n)
      scores[t][n][0] = scores[t][n][1] = scores[t][n][2] = scores[t][n][3] = 0.f;
#pragma unroll
    for (int d = 0; d < DIM_TILES; d += Operands::TILES) {
      u32 a[Operands::TILES][4];
      Operands::load_keys(a, keys, t * 16, d);
#pragma unroll
      for (int i = 0; i < Operands::TILES; ++i)
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; ++n)
          mma_16x8x16<mma_t>(scores[t][n], a[i], q.b[d + i][n][0], q.b[d + i][n][1]);
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
        if (SOFTCAP) x = p.softcap_log2 * tanh_exp2(x * q.scale);
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
        if (MASKED) a[i][0] &= keep[0], a[i][1] &= keep[0], a[i][2] &= keep[1], a[i][3] &= keep[1];
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; ++n)
          mma_16x8x16<mma_t>(state.o[d + i][n], a[i], weights[n][0], weights[n][1]);
      }
    }
  }
}

// A warp's state of a segment into shared memory.
__device__ __forceinline__ void share(Shared& shared, State& state, const Rows& rows) {
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

// What one block leaves of a segment that it shares with others: rows of `Item` order.
struct Partial {
  float4 o[HEADS * COLUMNS * (HEAD_DIM / 4)];
  float2 ml[HEADS * COLUMNS];
};

// At most two a block: of a segment that began before its share, and of one that begins in it.
__device__ __forceinline__ Partial& partial(const Params& p, int block, bool begins) {
  return reinterpret_cast<Partial*>(p.partials)[block * 2 + begins];
}

constexpr u32 EMPTY = 0xffffffff;  // a word that nobody has written; arithmetic makes the NaN 0x7fffffff only

__device__ __forceinline__ float written(float x) {
  return __float_as_uint(x) == EMPTY ? __uint_as_float(EMPTY >> 1) : x;
}

__device__ __forceinline__ bool empty(float2 x) { return max(__float_as_uint(x.x), __float_as_uint(x.y)) == EMPTY; }
__device__ __forceinline__ bool empty(float4 x) {
  return empty(float2{x.x, x.y}) || empty(float2{x.z, x.w});
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

// Add up the warps' shares of a segment; write it out where that is complete, else leave a partial.
__device__ __forceinline__ void gather(const Params& p, const Shared& shared, const Segment& s, Rows rows,
                                       bool complete, Partial& partial) {
  const int first_head = rows.kv_head - threadIdx.x / 32 % HEADS;
  for (int i = threadIdx.x; i < Item::count(rows.count); i += THREADS) {
    const Item at(i, rows.count);
    Sum sum;
#pragma unroll
    for (int warp = 0; warp < WARPS; warp += HEADS) sum.m = fmaxf(sum.m, shared.m[warp + at.key_head][at.row]);
#pragma unroll
    for (int warp = 0; warp < WARPS; warp += HEADS) {
      const int from = warp + at.key_head;
      sum.add(fast_exp2(shared.m[from][at.row] - sum.m), shared.l[from][at.row],
              *reinterpret_cast<const float4*>(&shared.o[from][at.row][at.dim]));
    }
    if (complete) {
      rows.kv_head = first_head + at.key_head;
      finish(p, s, rows, at.row, at.dim, sum);
    } else {
      partial.o[i] = make_float4(written(sum.o.x), written(sum.o.y), written(sum.o.z), written(sum.o.w));
      if (at.dim == 0) partial.ml[i / (HEAD_DIM / 4)] = make_float2(written(sum.m), written(sum.l));
    }
  }
}

// Add up the partials of blocks first, first + 1, ... of a segment and leave their places empty. `scratch` is
// shared memory. Threads to spare form teams that divide the blocks among themselves. This runs once, out
// of a cold instruction cache and with nothing to hide behind: it is short on purpose.
__device__ __forceinline__ void merge(const Params& p, u32 first, u32 blocks, u8* scratch, const Segment& s,
                                      Rows rows) {
  constexpr int BATCH = 8;  // loads in flight
  const float nothing = __uint_as_float(EMPTY);
  const u32 lines = HEADS * rows.count, items = Item::count(rows.count);
  const u32 teams = items >= THREADS ? 1 : divide(THREADS, items), team = divide(threadIdx.x, items);
  float2* const ml = reinterpret_cast<float2*>(scratch);
  for (u32 i = threadIdx.x; i < blocks * lines; i += THREADS) {
    const u32 block = divide(i, lines);
    float2* const place = partial(p, first + block, block == 0).ml + (i - block * lines);
    float2 x = load_relaxed(place);
    while (empty(x)) x = load_relaxed(place);
    ml[i] = x;
    *place = make_float2(nothing, nothing);
  }
  __syncthreads();
  Sum* const sums = reinterpret_cast<Sum*>(ml + (blocks * lines + 1) / 2 * 2);
  const int first_head = rows.kv_head - threadIdx.x / 32 % HEADS;
  for (u32 turn = 0; turn < items; turn += THREADS) {
    const u32 i = turn + threadIdx.x - (teams > 1 ? team * items : 0);
    const float2* const line = ml + i / (HEAD_DIM / 4);
    Sum sum;
    if (i < items && team < teams) {
#pragma unroll 4
      for (u32 block = 0; block < blocks; ++block) sum.m = fmaxf(sum.m, line[block * lines].x);
      for (u32 from = team; from < blocks; from += BATCH * teams) {
        float4 o[BATCH];
#pragma unroll
        for (int j = 0; j < BATCH; ++j) {
          const u32 block = from + j * teams;
          if (block < blocks) o[j] = load_relaxed(partial(p, first + block, block == 0).o + i);
        }
#pragma unroll
        for (int j = 0; j < BATCH; ++j) {
          const u32 block = from + j * teams;
          if (block >= blocks) break;
          float4* const place = partial(p, first + block, block == 0).o + i;
          while (empty(o[j])) o[j] = load_relaxed(place);
          *place = make_float4(nothing, nothing, nothing, nothing);
          const float2 its = line[block * lines];
          sum.add(fast_exp2(its.x - sum.m), its.y, o[j]);
        }
      }
    }
    if (teams > 1) {
      sums[threadIdx.x] = sum;
      __syncthreads();
    }
    if (i < items && team == 0) {
#pragma unroll 1
      for (u32 other = 1; other < teams; ++other) sum.add(1.f, sums[other * items + i].l, sums[other * items + i].o);
      const Item at(i, rows.count);
      rows.kv_head = first_head + at.key_head;
      finish(p, s, rows, at.row, at.dim, sum);
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) attend(const __grid_constant__ TensorMap k_map,
                                                                const __grid_constant__ TensorMap v_map,
                                                                const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) u8 dynamic[];
  constexpr int RINGS = WARPS * STAGES * 2 * Shape::BYTES;
  Shared& shared = *reinterpret_cast<Shared*>(dynamic + RINGS);
  const int warp = threadIdx.x / 32;

  if (threadIdx.x % 32 == 0) {
    for (int stage = 0; stage < STAGES; ++stage) shared.full[warp][stage].init(1);
    fence_barrier_init();
    prefetch(k_map);
    prefetch(v_map);
  }
  // Under programmatic launch the kernel ahead may still run: nothing of it is touched above this line.
  grid_dependency_wait();
  grid_launch_dependents();
  int* const tables = reinterpret_cast<int*>(dynamic + RINGS + sizeof(Shared));
  WorkList work{p.batch, p.segments, p.q_len, p.left, p.cu_seqlens_q, tables, tables + p.batch + 1};
  work.plan(p.seq_lens, gridDim.x, shared.scratch);
  if (blockIdx.x >= work.workers) return;

  const int share_begin = work.begin(blockIdx.x), share_end = work.begin(blockIdx.x + 1);
  TileStream stream{work, k_map, v_map, p.page_table, p.table_stride, p.row_blocks,
                    dynamic + warp * STAGES * 2 * Shape::BYTES, shared.full[warp],
                    share_begin + warp / HEADS, share_end};
  stream.start();

  Queries q;
  State state;
  bool merges = false;  // a segment that began before this share ends in it
  Segment shared_segment;
  u32 first_block;
  for (int begin = share_begin; begin < share_end;) {
    const Segment s = work.segment(begin);
    const Rows rows(s, p.row_blocks, warp % HEADS);
    const int end = min(share_end, s.end);
    const bool begins = s.begin >= share_begin, ends = s.end <= share_end;
    if (ends && !begins) {
      merges = true;
      shared_segment = s;
      first_block = work.owner(s.begin);
    }
    q.load(p, s, rows);
    state.reset();
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
    share(shared, state, rows);
    __syncthreads();
    gather(p, shared, s, rows, begins && ends, partial(p, blockIdx.x, begins));
    __syncthreads();
    begin = end;
  }
  if (merges)
    merge(p, first_block, blockIdx.x - first_block + 1, dynamic, shared_segment,
          Rows(shared_segment, p.row_blocks, warp % HEADS));
}
