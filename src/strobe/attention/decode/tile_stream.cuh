// One warp's stream of key and value tiles out of a paged cache, or a dense one.
//
// Each warp feeds itself: its own ring of STAGES tiles in shared memory, its own barriers, copies started
// by its own lanes, so that warps never wait for one another and the memory sees WARPS * STAGES tiles in
// flight from each block.
//
// A tile comes in runs: keys that stand in one page, one bulk copy for K and one for V each. Lane i looks
// up the i-th run ahead (row, page number, offset), so a page table entry is fetched once and its latency
// is paid once for 32 runs.
//
// In shared memory a run is [RUN][ROW_BYTES], each SPAN_BYTES of a row swizzled by the copy engine.
//
// Tiles are read once: they are the first that the L2 cache gives up.
//
// Defines: HEAD_DIM, PAGE_SIZE, KEYS (a tile), STAGES; kv_t is the cache's element. SETTLED: the kernel ahead, which may
// still run, writes q and the cache's keys of this call's queries, nothing else that is read here.
#pragma once

#include "grid_dependency.cuh"
#include "segment.cuh"
#include "tma.cuh"

__host__ __device__ constexpr int gcd(int a, int b) { return b ? gcd(b, a % b) : a; }

struct TileShape {
  static constexpr int ROW_BYTES = HEAD_DIM * sizeof(kv_t);
  // 16 bytes: not swizzled. Rows of 80 need not be: eight of a run meet different banks.
  static constexpr int SPAN_BYTES =
      ROW_BYTES % 128 == 0 ? 128 : ROW_BYTES % 64 == 0 ? 64 : ROW_BYTES % 32 == 0 ? 32 : 16;
  static constexpr int RUN = gcd(PAGE_SIZE, KEYS);  // DENSE: what lies past the last key arrives as zeros
  static constexpr int RUNS = KEYS / RUN;
  static constexpr int RUN_BYTES = RUN * ROW_BYTES;                  // what a copy brings
  static constexpr int RUN_PITCH = (RUN_BYTES + 127) / 128 * 128;    // copies start on 128 bytes
  static constexpr int REPEAT = SPAN_BYTES > 16 ? 1024 : 128;        // bytes between places that are swizzled alike
  static constexpr int BYTES = (RUNS * RUN_PITCH + REPEAT - 1) / REPEAT * REPEAT;

  // Where 16 bytes of a key's row stand; `byte` is a multiple of 16.
  static __device__ __forceinline__ u32 address(u32 tile, int key, int byte) {
    const u32 offset = key / RUN * RUN_PITCH + key % RUN * ROW_BYTES + byte;
    return tile + (offset ^ (offset >> 3 & (SPAN_BYTES - 16)));
  }
};

struct Run {
  int page, token, head;  // page -1: no keys here
  bool fresh;             // some of its keys may be those of this call's queries
};

// `Tiles` knows which tiles are the warp's, every stride()th before `end`, and finds their runs. EAGER: also where a
// run lies past the end, so that nobody waits to know.
template <class Tiles>
struct TileStream {
  using Shape = TileShape;
  static constexpr int AHEAD = 32 / Shape::RUNS;  // tiles that the lanes look ahead
  static_assert(Shape::RUNS <= 32 && 32 % Shape::RUNS == 0, "a tile's runs fit in a warp");

  const Tiles& tiles;
  const TensorMap &k_map, &v_map;
  u8* ring;       // shared [STAGES][2][Shape::BYTES]: this warp's tiles of K and V
  Barrier* full;  // shared [STAGES]

  int coming;                // the next tile to fetch
  int front, stage, parity;  // the tile at the front, and where it stands
  int slot;                  // in `now`, the runs that the lanes have looked up; `next` holds those after them
  Run now, next;

  // Begin at tile `coming`.
  __device__ __forceinline__ void start() {
    front = coming;
    stage = parity = slot = 0;
    now = find(coming);
    const int after = coming + AHEAD * tiles.stride();
#pragma unroll 1
    for (int i = 0; i < min(STAGES, AHEAD); ++i) fetch(i);
    next = find(after);
#pragma unroll 1
    for (int i = AHEAD; i < STAGES; ++i) fetch(i);
  }

  __device__ __forceinline__ u32 keys() const { return shared_address(ring) + stage * (2 * Shape::BYTES); }
  __device__ __forceinline__ u32 values() const { return keys() + Shape::BYTES; }
  __device__ __forceinline__ int tile() const { return front; }
  __device__ __forceinline__ void wait() const { full[stage].wait(parity); }

  // Done with the tile at the front: its stage takes the next one to come.
  __device__ __forceinline__ void advance() {
    __syncwarp();
    fetch(stage);
    front += tiles.stride();
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }

 private:
  // Start the copies of the next tile to come, if there is one, into stage `into`.
  __device__ __forceinline__ void fetch(int into) {
    if (coming >= tiles.end) return;
    const int lane = threadIdx.x % 32;
    if (slot == AHEAD) {
      now = next;
      next = find(coming + AHEAD * tiles.stride());
      slot = 0;
    }
    const bool mine = lane / Shape::RUNS == slot && now.page >= 0;
    const int runs = __popc(__ballot_sync(~0u, mine));
    u8* const k_tile = ring + into * (2 * Shape::BYTES) + lane % Shape::RUNS * Shape::RUN_PITCH;
    if (lane == 0) full[into].arrive_expecting(runs * (2 * Shape::RUN_BYTES));
    if (mine) {
      if (SETTLED && now.fresh) grid_dependency_wait();
      tma_load_once(k_tile, k_map, full[into], 0, 0, now.token, now.head, now.page);
      tma_load_once(k_tile + Shape::BYTES, v_map, full[into], 0, 0, now.token, now.head, now.page);
    }
    ++slot;
    coming += tiles.stride();
  }

  // This lane's run of the tiles from `first` on.
  __device__ __forceinline__ Run find(int first) const {
    const int lane = threadIdx.x % 32, tile = first + lane / Shape::RUNS * tiles.stride();
    Run run{-1, 0, 0, false};
    if (Tiles::EAGER || tile < tiles.end) tiles.find(run, tile, lane % Shape::RUNS * Shape::RUN);
    return run;
  }
};
