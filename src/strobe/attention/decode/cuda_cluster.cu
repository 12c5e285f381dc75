// Decode attention over a paged or dense cache, one launch: a cluster of blocks for the query rows of each key head.
//
//   1. deal     tile i of a row goes to warp i % WARPS of block i / WARPS % SIZE of its cluster. Which pages a
//               warp begins with does not depend on the row's length, so that length and page numbers are
//               asked for at once, and nobody plans
//   2. stream   every warp keeps STAGES tiles on their way into its own ring (tile_stream.cuh)
//   3. attend   on tensor cores, a group of heads sharing each key and value (attend_tile.cuh)
//   4. gather   the block's warps add up their shares (docs/math.md, eq. 6)
//   5. merge    each block has a part of the output: the others push their sums of it into its shared memory
//
// What a row gives depends on its own length and on the cluster's size, bit for bit, not on the batch it is
// in. No block waits for another but those of its cluster, which run at the same time by CUDA's promise.
//
// Defines: as attend_tile.cuh (HEADS 1), BLOCKS (that an SM shall hold), WINDOWED (a window hides old keys).
#include "cluster.cuh"
#include "cluster_push.cuh"
#include "reduce.cuh"
#include "shares.cuh"

constexpr int PARTS = 16;  // the most blocks of a cluster: as many lanes add up an item
constexpr int TEAMS = THREADS / PARTS;

// Dynamic shared memory: the warps' rings and in their place what the warps leave, Shared, Parts.
constexpr int TILES_BYTES = WARPS * STAGES * 2 * TileShape::BYTES;
constexpr int RINGS = TILES_BYTES > sizeof(Shares) ? TILES_BYTES : ceil_div(int(sizeof(Shares)), 16) * 16;

struct alignas(16) Shared {
  Barrier full[WARPS][STAGES];
  Barrier told;  // of all blocks' sums of this block's items
};

// A segment's items, dealt to the blocks of the cluster TEAMS at a time, and room for what all blocks tell this one of
// its own.
struct Parts {
  int items, blocks;
  float4* o;   // shared [turns][TEAMS][blocks]
  float2* ml;  // alike, behind as many turns as the block with the most has

  __device__ __forceinline__ Parts(u8* shared, int rows) : items(Item::count(rows)), blocks(cluster_size()) {
    o = reinterpret_cast<float4*>(shared);
    ml = reinterpret_cast<float2*>(o + ceil_div(items, TEAMS * blocks) * TEAMS * blocks);
  }
  // What this block will be told.
  __device__ __forceinline__ u32 bytes() const {
    int own = 0;
    for (int first = cluster_rank() * TEAMS; first < items; first += TEAMS * blocks) own += min(TEAMS, items - first);
    return own * blocks * (sizeof *o + sizeof *ml);
  }
  __device__ __forceinline__ void tell(int item, const Sum& sum, Barrier& told) const {
    const int turn = divide(item / TEAMS, blocks), rank = item / TEAMS - turn * blocks;
    const int at = (turn * TEAMS + item % TEAMS) * blocks + cluster_rank();
    push(o + at, sum.o, told, rank);
    push(ml + at, make_float2(sum.m, sum.l), told, rank);
  }
};

struct DealtTiles {
  const int* pages;  // of the row
  int columns;       // of the page table
  int row, kv_len, q_len, head;
  int first_tile;  // of the segment: tiles are counted from it
  int end, step;

  static constexpr bool EAGER = true;
  __device__ __forceinline__ int stride() const { return step; }

  // The run of a tile that begins `offset` keys into it, if there are keys. The page number is asked for before
  // kv_len is known.
  __device__ __forceinline__ void find(Run& run, int tile, int offset) const {
    const int key = (first_tile + tile) * KEYS + offset, column = key / PAGE;
    const int page = DENSE ? row : column < columns ? pages[column] : -1;
    run.page = key < kv_len ? page : -1;
    run.token = DENSE ? key : key % PAGE;
    run.head = head;
    run.fresh = key + TileShape::RUN > kv_len - q_len;
  }
};

// Lets the kernel behind start when what is left to ask for fits in the ring: any sooner, and its first tiles take the
// memory that these still need.
struct DealtStream : TileStream<DealtTiles> {
  __device__ __forceinline__ void wait() const {
    if (SETTLED && coming + STAGES * tiles.stride() >= tiles.end) grid_launch_dependents();
    TileStream::wait();
  }
};

// Add up the block's warps, and tell each item's block.
__device__ __forceinline__ void gather(const Shares& shares, const Parts& parts, const Rows& rows, Barrier& told) {
  for (int i = threadIdx.x; i < parts.items; i += THREADS) parts.tell(i, sum_warps(shares, Item(i, rows.count)), told);
}

// Add up what the blocks have told. PARTS lanes take an item, each the part of one block.
__device__ __forceinline__ void merge(const Params& p, const Segment& s, const Rows& rows, const Parts& parts) {
  const int rank = threadIdx.x % PARTS, team = threadIdx.x / PARTS;
#pragma unroll 1
  for (int turn = 0, first = cluster_rank() * TEAMS; first < parts.items; ++turn, first += parts.blocks * TEAMS) {
    const int i = first + team, at = (turn * TEAMS + team) * parts.blocks + rank;
    Sum sum;
    if (i < parts.items && rank < parts.blocks) {
      sum.m = parts.ml[at].x, sum.l = parts.ml[at].y;
      sum.o = parts.o[at];
    }
    const float m = warp_max<PARTS>(sum.m), weight = fast_exp2(sum.m - m);
    sum.m = m;
    sum.l = warp_sum<PARTS>(sum.l * weight);
    sum.o.x = warp_sum<PARTS>(sum.o.x * weight), sum.o.y = warp_sum<PARTS>(sum.o.y * weight);
    sum.o.z = warp_sum<PARTS>(sum.o.z * weight), sum.o.w = warp_sum<PARTS>(sum.o.w * weight);
    if (i < parts.items && rank == 0) {
      const Item at(i, rows.count);
      finish(p, s, rows, at.row, at.dim, sum);
    }
  }
}

// grid (cluster, segments of a row, batch)
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) attend(const __grid_constant__ TensorMap k_map,
                                                                     const __grid_constant__ TensorMap v_map,
                                                                     const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) u8 dynamic[];
  Shares& shares = *reinterpret_cast<Shares*>(dynamic);
  Shared& shared = *reinterpret_cast<Shared*>(dynamic + RINGS);
  const int warp = threadIdx.x / 32, row = blockIdx.z;
  const int begin = blockIdx.x * WARPS + warp, step = gridDim.x * WARPS;  // the warp's tiles
  const int* const pages = p.page_table + i64(row) * p.table_stride;

  // Under programmatic launch the kernel ahead may still run. Where it does so beside the one behind, too, that one may
  // read early only what neither writes; its wait returns when this kernel has ended, which has waited itself.
  if (SETTLED && p.table_columns * PAGE_SIZE <= STAGES * KEYS * step) grid_launch_dependents();  // rings hold all
  if (threadIdx.x % 32 == 0) {
    for (int stage = 0; stage < STAGES; ++stage) shared.full[warp][stage].init(1);
    if (warp == 0) shared.told.init(1);
    fence_barrier_init();
    prefetch(k_map);
    prefetch(v_map);
  }
  __syncwarp();
  cluster_arrive();
  if (!SETTLED) {
    grid_dependency_wait();
    grid_launch_dependents();
  }

  Segment s;
  s.row = row, s.head = blockIdx.y;
  s.kv_len = Lengths{p.seq_lens, p.kv_len}[row];
  s.q_start = p.cu_seqlens_q ? p.cu_seqlens_q[row] : row * p.q_len;
  s.q_len = p.cu_seqlens_q ? p.cu_seqlens_q[row + 1] - s.q_start : p.q_len;
  const int first_tile = WINDOWED ? Window{p.left}.first_tile(s.kv_len, s.q_len) : 0;
  s.first_key = first_tile * KEYS;
  s.begin = 0;
  s.end = ceil_div(s.kv_len, KEYS) - first_tile;
  const Rows rows(s, p.row_blocks, 0);
  if (rows.count <= 0) {  // a packed row with fewer queries than others
    grid_dependency_wait();
    cluster_wait();
    return;
  }
  const DealtTiles tiles{pages, p.table_columns, row, s.kv_len, s.q_len, rows.kv_head, first_tile, s.end, step};
  DealtStream stream{
      {tiles, k_map, v_map, dynamic + warp * STAGES * 2 * TileShape::BYTES, shared.full[warp], begin}};
  stream.start();
  const Parts parts(dynamic + RINGS + sizeof(Shared), rows.count);
  if (threadIdx.x == 0) shared.told.arrive_expecting(parts.bytes());
  cluster_wait();  // all blocks can be told
  if (SETTLED) grid_dependency_wait();

  Queries q;
  State state;
  q.load(p, s, rows);
  state.reset();
  attend_tiles(p, stream, s.end, s, rows, q, state);
  __syncthreads();  // no warp needs its ring any more
  share(shares, state, rows);
  __syncthreads();
  gather(shares, parts, rows, shared.told);
  shared.told.wait(0);
  merge(p, s, rows, parts);
}
