// Decode attention, one launch: read every key and value of a paged or dense cache once, as fast as memory gives them.
//
//   1. plan      every block reads the lengths and takes its even share of all tiles (work_list.cuh)
//   2. stream    every warp keeps STAGES tiles on their way into its own ring (tile_stream.cuh)
//   3. attend    on tensor cores, a group of heads sharing each key and value (attend_tile.cuh)
//   4. gather    the block's warps add up their shares of a segment (shares.cuh)
//   5. merge     what blocks that share a segment have left is added up in a tree (partials.cuh)
//
// Blocks are numbered as they start, and a block waits for lower numbers only: those run, or have run.
//
// Defines: as attend_tile.cuh.
#include "partials.cuh"
#include "work_list.cuh"

struct Shared {
  Shares shares;
  Barrier full[WARPS][STAGES];
  int scratch[WARPS];
};

// Number this block by the order in which blocks start, for whoever passes the next block barrier. The counter behind the
// partials goes round: it stands where the next launch of as many blocks begins, and so do all bits one.
__device__ __forceinline__ void take_number(const Params& p, int& number) {
  if (threadIdx.x != THREADS - 1) return;  // the first threads are about to wait for the lengths
  u32* const counter = reinterpret_cast<u32*>(&partial(p, gridDim.x, 0));
  const u32 taken = atomicInc(counter, gridDim.x - 1) + 1;
  number = taken < gridDim.x ? taken : 0;
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
      run.page = DENSE ? s.row : page_table[i64(s.row) * table_stride + key / PAGE];
      run.token = DENSE ? key : key % PAGE;
      run.head = (row_blocks == 1 ? s.head : s.head / row_blocks) * HEADS + threadIdx.x / 32 % HEADS;
      run.fresh = key + TileShape::RUN > s.kv_len - s.q_len;
    }
  }
};

// Add up the warps' shares of a segment.
__device__ __forceinline__ void gather(const Params& p, const Shares& shares, const Segment& s, const Rows& rows,
                                       bool complete, Partial& to) {
  for (int i = threadIdx.x; i < Item::count(rows.count); i += THREADS)
    leave(p, s, rows, i, sum_warps(shares, Item(i, rows.count)), complete, to);
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
  if (!SETTLED) grid_dependency_wait();
  int* const tables = reinterpret_cast<int*>(dynamic + RINGS + sizeof(Shared));
  int& number = tables[2 * p.batch + 1];
  take_number(p, number);
  WorkList work{p.batch, p.segments, p.q_len, {p.left}, p.cu_seqlens_q, tables, tables + p.batch + 1};
  work.plan(Lengths{p.seq_lens, p.kv_len}, gridDim.x, shared.scratch);
  const u32 block = number;
  if (!SETTLED) grid_launch_dependents();  // once all blocks are numbered
  if (block >= work.workers) return;

  const int share_begin = work.begin(block), share_end = work.begin(block + 1);
  const ListedTiles tiles{work, p.page_table, p.table_stride, p.row_blocks, share_end};
  TileStream<ListedTiles> stream{tiles, k_map, v_map, dynamic + warp * STAGES * 2 * TileShape::BYTES,
                                 shared.full[warp], share_begin + warp / HEADS};
  stream.start();

  // The segment that began before this share, if there is one, is shared with other blocks.
  const Segment first = work.segment(share_begin);
  Sharers sharers{};
  bool merges = false;
  if (first.begin < share_begin) {
    sharers = {work.owner(first.begin), first.end <= share_end ? block : work.owner(first.end - 1)};
    merges = sharers.adds_up(block);
  }
  if (SETTLED) {
    grid_dependency_wait();
    grid_launch_dependents();
  }

  Queries q;
  State state;
  bool holds = false;  // the block's part of what it merges is in shared memory still
  Segment s = first;
  for (int begin = share_begin;;) {
    const Rows rows(s, p.row_blocks, warp % HEADS);
    const int end = min(share_end, s.end);
    q.load(p, s, rows);
    state.reset();
    attend_tiles(p, stream, end, s, rows, q, state);
    share(shared.shares, state, rows);
    __syncthreads();
    holds = merges && begin == share_begin && end == share_end;
    if (holds) break;
    const bool begins = s.begin >= share_begin;
    gather(p, shared.shares, s, rows, begins && s.end <= share_end, partial(p, block, begins ? BEGINS : CONTINUES));
    __syncthreads();
    begin = end;
    if (begin == share_end) break;
    s = work.segment(begin);
  }
  if (merges)
    merge(p, shared.shares, block, sharers, holds, reinterpret_cast<Sum*>(dynamic), first,
          Rows(first, p.row_blocks, warp % HEADS));
}
