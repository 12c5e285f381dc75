// Decode attention over a paged cache, one launch: a cluster of blocks for the query rows of each key head.
//
//   1. deal     tile i of a row goes to warp i % WARPS of block i / WARPS % SIZE of its cluster. Which pages a
//               warp begins with does not depend on the row's length, so that length and page numbers are
//               asked for at once, and nobody plans
//   2. stream   every warp keeps STAGES tiles on their way into its own ring (tile_stream.cuh)
//   3. attend   on tensor cores, a group of heads sharing each key and value (attend_tile.cuh)
//   4. gather   the block's warps add up their shares (docs/math.md, eq. 6)
//   5. merge    the blocks read one another's sums in shared memory, each for its part of the output
//
// What a row gives depends on its own length and on the cluster's size, bit for bit, not on the batch it is
// in. No block waits for another but those of its cluster, which run at the same time by CUDA's promise.
//
// Defines: as attend_tile.cuh (HEADS 1), BLOCKS (that an SM shall hold), WINDOWED (a window hides old keys).
#include "cluster.cuh"
#include "memory.cuh"
#include "reduce.cuh"
#include "shares.cuh"

constexpr int PARTS = 16;  // the most blocks of a cluster: as many lanes add up an item

// What a block knows of its segment: rows of `Item` order.
struct Part {
  float4 o[COLUMNS * (HEAD_DIM / 4)];
  float2 ml[COLUMNS];
};

struct Shared {
  Shares shares;
  Barrier full[WARPS][STAGES];
};

struct DealtTiles {
  const int* pages;  // of the row
  int columns;       // of the page table
  int kv_len, q_len, head;
  int first_tile;  // of the segment: tiles are counted from it
  int end, step;

  static constexpr bool EAGER = true;
  __device__ __forceinline__ int stride() const { return step; }

  // The run of a tile that begins `offset` keys into it, if there are keys. The page number is asked for before
  // kv_len is known.
  __device__ __forceinline__ void find(Run& run, int tile, int offset) const {
    const int key = (first_tile + tile) * KEYS + offset, column = key / PAGE_SIZE;
    const int page = column < columns ? pages[column] : -1;
    run.page = key < kv_len ? page : -1;
    run.token = key % PAGE_SIZE;
    run.head = head;
    run.fresh = key + TileShape::RUN > kv_len - q_len;
  }
};

// A block's warps added up, for the cluster to read.
__device__ __forceinline__ void gather(const Shares& shares, const Rows& rows, Part& part) {
  for (int i = threadIdx.x; i < Item::count(rows.count); i += THREADS) {
    const Item at(i, rows.count);
    const Sum sum = sum_warps(shares, at);
    part.o[i] = sum.o;
    if (at.dim == 0) part.ml[at.row] = make_float2(sum.m, sum.l);
  }
}

// Add up the blocks' parts. The items are dealt to the blocks; PARTS lanes take one, each the part of one block.
__device__ __forceinline__ void merge(const Params& p, const Segment& s, const Rows& rows, const Part& part) {
  constexpr int TEAMS = THREADS / PARTS;
  const int rank = threadIdx.x % PARTS, team = threadIdx.x / PARTS, blocks = cluster_size();
  const int items = Item::count(rows.count);
#pragma unroll 1
  for (int first = cluster_rank() * TEAMS; first < items; first += blocks * TEAMS) {
    const int i = first + team;
    Sum sum;
    if (i < items && rank < blocks) {
      const float2 ml = load_remote(&part.ml[i / (HEAD_DIM / 4)], rank);
      sum.m = ml.x, sum.l = ml.y;
      sum.o = load_remote(&part.o[i], rank);
    }
    const float m = warp_max<PARTS>(sum.m), weight = fast_exp2(sum.m - m);
    sum.m = m;
    sum.l = warp_sum<PARTS>(sum.l * weight);
    sum.o.x = warp_sum<PARTS>(sum.o.x * weight), sum.o.y = warp_sum<PARTS>(sum.o.y * weight);
    sum.o.z = warp_sum<PARTS>(sum.o.z * weight), sum.o.w = warp_sum<PARTS>(sum.o.w * weight);
    if (i < items && rank == 0) {
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
  constexpr int RINGS = WARPS * STAGES * 2 * TileShape::BYTES;
  static_assert(RINGS >= sizeof(Part), "a part takes the rings' place");
  Shared& shared = *reinterpret_cast<Shared*>(dynamic + RINGS);
  const int warp = threadIdx.x / 32, row = blockIdx.z;
  const int begin = blockIdx.x * WARPS + warp, step = gridDim.x * WARPS;  // the warp's tiles
  const int* const pages = p.page_table + i64(row) * p.table_stride;

  if (threadIdx.x % 32 == 0) {
    for (int stage = 0; stage < STAGES; ++stage) shared.full[warp][stage].init(1);
    fence_barrier_init();
    prefetch(k_map);
    prefetch(v_map);
  }
  __syncwarp();
  // Under programmatic launch the kernel ahead may still run.
  if (!SETTLED) {
    grid_dependency_wait();
    grid_launch_dependents();
  }

  Segment s;
  s.row = row, s.head = blockIdx.y;
  s.kv_len = p.seq_lens[row];
  s.q_start = p.cu_seqlens_q ? p.cu_seqlens_q[row] : row * p.q_len;
  s.q_len = p.cu_seqlens_q ? p.cu_seqlens_q[row + 1] - s.q_start : p.q_len;
  const int first_tile = WINDOWED ? Window{p.left}.first_tile(s.kv_len, s.q_len) : 0;
  s.first_key = first_tile * KEYS;
  s.begin = 0;
  s.end = ceil_div(s.kv_len, KEYS) - first_tile;
  const Rows rows(s, p.row_blocks, 0);
  if (rows.count <= 0) {  // a packed row with fewer queries than others
    grid_dependency_wait();
    return;
  }
  const DealtTiles tiles{pages, p.table_columns, s.kv_len, s.q_len, rows.kv_head, first_tile, s.end, step};
  TileStream<DealtTiles> stream{tiles, k_map, v_map, dynamic + warp * STAGES * 2 * TileShape::BYTES,
                                shared.full[warp], begin};
  stream.start();
  if (SETTLED) {
    grid_dependency_wait();
    grid_launch_dependents();
  }

  Queries q;
  State state;
  q.load(p, s, rows);
  state.reset();
  attend_tiles(p, stream, s.end, s, rows, q, state);
  share(shared.shares, state, rows);
  __syncthreads();
  Part& part = *reinterpret_cast<Part*>(dynamic);
  gather(shared.shares, rows, part);
  cluster_sync();
  merge(p, s, rows, part);
  cluster_sync();  // nobody reads a part any more
}
