// Decode attention over a paged cache, one launch: read every key and value once, as fast as memory gives them.
//
//   1. plan      every block reads the lengths and takes its even share of all tiles (work_list.cuh)
//   2. stream    every warp keeps STAGES tiles on their way into its own ring (tile_stream.cuh)
//   3. attend    on tensor cores, a group of heads sharing each key and value (attend_tile.cuh)
//   4. gather    the block's warps add up their shares of a segment (shares.cuh)
//   5. merge     a segment that several blocks share is added up by the last of them, in their order: same
//                inputs, same bits. Partials tell by themselves when they are there, so nobody counts or
//                fences: an empty word is a NaN that arithmetic never makes
//
// A merge waits for blocks of lower number only. With TICKETS blocks are numbered as they start, so those have
// started. Without, it ends because blocks start in the order of their numbers, as every NVIDIA GPU so far has
// it, though CUDA does not promise it.
//
// Defines: as attend_tile.cuh, and TICKETS.
#include "memory.cuh"
#include "shares.cuh"
#include "work_list.cuh"

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

struct Shared {
  Shares shares;
  Barrier full[WARPS][STAGES];
  int scratch[WARPS];
};

// Ask for the lengths and the page table, dealt line by line to the threads of the grid.
__device__ __forceinline__ void ask_for_tables(const Params& p) {
  constexpr int LINE = 32;  // ints
  for (int line = threadIdx.x; line < ceil_div(p.batch, LINE); line += THREADS) prefetch_l2(p.seq_lens + line * LINE);
  for (int line = threadIdx.x * gridDim.x + blockIdx.x; line < p.hint_lines; line += THREADS * gridDim.x)
    prefetch_l2(p.page_table + line * LINE);
}

// Number this block by the order in which blocks start, for whoever passes the next block barrier. The counter
// goes round: it stands where the next launch of as many blocks begins, and so do all bits one.
__device__ __forceinline__ void take_ticket(const Params& p, int& ticket) {
  if (threadIdx.x != THREADS - 1) return;  // the first threads are about to wait for the lengths
  const u32 number = atomicInc(reinterpret_cast<u32*>(p.partials + 2 * gridDim.x * sizeof(Partial)), gridDim.x - 1) + 1;
  ticket = number < gridDim.x ? number : 0;
}

// A block's share of the list, dealt to its warps: warp w takes head w % HEADS of every STEPth tile.
struct ListedTiles {
  const WorkList& work;
  const int* page_table;
  int table_stride, row_blocks;
  int end;

  static constexpr bool EAGER = false;
  static __device__ __forceinline__ constexpr int stride() { return STEP; }

  // The run of a tile that begins `offset` keys into it, if there are keys.
  __device__ __forceinline__ void find(Run& run, int tile, int offset) const {
    const Segment s = work.segment(tile);
    const int key = s.first_key + (tile - s.begin) * KEYS + offset;
    if (key < s.kv_len) {
      run.page = page_table[i64(s.row) * table_stride + key / PAGE_SIZE];
      run.token = key % PAGE_SIZE;
      run.head = (row_blocks == 1 ? s.head : s.head / row_blocks) * HEADS + threadIdx.x / 32 % HEADS;
      run.fresh = key + TileShape::RUN > s.kv_len - s.q_len;
    }
  }
};

// Add up the warps' shares of a segment; write it out where that is complete, else leave a partial.
__device__ __forceinline__ void gather(const Params& p, const Shared& shared, const Segment& s, Rows rows,
                                       bool complete, Partial& partial) {
  const int first_head = rows.kv_head - threadIdx.x / 32 % HEADS;
  for (int i = threadIdx.x; i < Item::count(rows.count); i += THREADS) {
    const Item at(i, rows.count);
    const Sum sum = sum_warps(shared.shares, at);
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
  if (rows.count <= 0) return;  // a packed row with fewer queries than others
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
  constexpr int RINGS = WARPS * STAGES * 2 * TileShape::BYTES;
  Shared& shared = *reinterpret_cast<Shared*>(dynamic + RINGS);
  const int warp = threadIdx.x / 32;

  if (threadIdx.x % 32 == 0) {
    for (int stage = 0; stage < STAGES; ++stage) shared.full[warp][stage].init(1);
    fence_barrier_init();
    prefetch(k_map);
    prefetch(v_map);
  }
  // Under programmatic launch the kernel ahead may still run.
  if (EARLY == HINTS) ask_for_tables(p);
  if (EARLY != READS) {
    grid_dependency_wait();
    grid_launch_dependents();
  }
  int* const tables = reinterpret_cast<int*>(dynamic + RINGS + sizeof(Shared));
  int& ticket = tables[2 * p.batch + 1];
  if (TICKETS) take_ticket(p, ticket);
  WorkList work{p.batch, p.segments, p.q_len, {p.left}, p.cu_seqlens_q, tables, tables + p.batch + 1};
  work.plan(p.seq_lens, gridDim.x, shared.scratch);
  const u32 block = TICKETS ? ticket : blockIdx.x;
  if (block >= work.workers) return;

  const int share_begin = work.begin(block), share_end = work.begin(block + 1);
  const ListedTiles tiles{work, p.page_table, p.table_stride, p.row_blocks, share_end};
  TileStream<ListedTiles> stream{tiles, k_map, v_map, dynamic + warp * STAGES * 2 * TileShape::BYTES,
                                 shared.full[warp], share_begin + warp / HEADS};
  stream.start();
  if (EARLY == READS) {
    grid_dependency_wait();
    grid_launch_dependents();
  }

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
    attend_tiles(p, stream, end, s, rows, q, state);
    share(shared.shares, state, rows);
    __syncthreads();
    gather(p, shared, s, rows, begins && ends, partial(p, block, begins));
    __syncthreads();
    begin = end;
  }
  if (merges)
    merge(p, first_block, block - first_block + 1, dynamic, shared_segment,
          Rows(shared_segment, p.row_blocks, warp % HEADS));
}
