// All keys of all rows and heads as one list of tiles, cut evenly among the blocks of the grid.
//
// A segment is the keys that a block of query rows sees in HEADS neighbouring key heads. Segments stand
// in the list one after the other (row by row, head by head), each as its tiles of KEYS keys. Every block
// gets an even share of the list without regard to segments: all read equally much, whatever the lengths,
// and only a share's first and last segment are shared with other blocks.
//
// The lengths are read on the device, by every block for itself.
//
// Defines: as segment.cuh.
#pragma once

#include "segment.cuh"

constexpr u32 MIN_TILES = 8;  // of a share: for less, the merge costs more than it saves

// This runs while memory waits for its first request: divisions are few and short.
struct WorkList {
  static constexpr int FRACTION = 22;  // bits; a share is each + part / 2^FRACTION tiles

  int batch, heads, q_len;
  Window window;
  const int* cu_seqlens_q;
  int* starts;   // shared [batch + 1]: tiles of one head ahead of each row
  int* kv_lens;  // shared [batch]
  u32 total;     // tiles
  u32 workers;   // blocks that get a share, under 512
  u32 each, part;

  // Read the lengths and cut the list. `scratch` is shared, an int a warp. All threads call it.
  __device__ __forceinline__ void plan(const Lengths& lengths, u32 most_workers, int* scratch) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int before = 0;
    for (int first = 0; first < batch; first += THREADS) {
      const int row = first + threadIdx.x;
      int mine = 0;
      if (row < batch) {
        kv_lens[row] = lengths[row];
        mine = tiles(kv_lens[row], row_q_len(row));
      }
      int upto = mine;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(~0u, upto, step);
        if (lane >= step) upto += other;
      }
      if (batch > 32) {
        if (first) __syncthreads();
        if (lane == 31) scratch[warp] = upto;
        __syncthreads();
#pragma unroll
        for (int other = 0; other < WARPS; ++other) {
          if (other < warp) upto += scratch[other];
        }
      }
      if (row < batch) starts[row + 1] = before + upto;
      if (first + THREADS < batch) {
#pragma unroll
        for (int other = 0; other < WARPS; ++other) before += scratch[other];
      }
    }
    if (threadIdx.x == 0) starts[0] = 0;
    __syncthreads();
    total = starts[batch] * heads;
    workers = min(most_workers, (total + MIN_TILES - 1) / MIN_TILES);
    each = total / workers;
    part = (((total - each * workers) << FRACTION) + workers - 1) / workers;
  }

  // The first tile of a block's share: worker * total / workers, rounded down.
  __device__ __forceinline__ u32 begin(u32 worker) const { return worker * each + (worker * part >> FRACTION); }
  // The block whose share holds a tile.
  __device__ __forceinline__ u32 owner(u32 tile) const {
    u32 worker = min(workers - 1, u32(__fdividef(float(tile) * float(workers), float(total))));
    while (begin(worker) > tile) --worker;
    while (begin(worker + 1) <= tile) ++worker;
    return worker;
  }

  __device__ __forceinline__ Segment segment(u32 tile) const {
    int row = 0;
    for (int above = batch; above - row > 1;) {
      const int middle = (row + above) / 2;
      if (u32(starts[middle] * heads) <= tile) row = middle;
      else above = middle;
    }
    Segment s;
    s.row = row;
    const int start = starts[row] * heads, length = starts[row + 1] - starts[row];
    s.head = divide(tile - start, length);
    s.begin = start + s.head * length;
    s.end = s.begin + length;
    s.kv_len = kv_lens[row];
    s.q_len = row_q_len(row);
    s.q_start = cu_seqlens_q ? cu_seqlens_q[row] : row * q_len;
    s.first_key = window.first_tile(s.kv_len, s.q_len) * KEYS;
    return s;
  }

 private:
  __device__ __forceinline__ int row_q_len(int row) const {
    return cu_seqlens_q ? cu_seqlens_q[row + 1] - cu_seqlens_q[row] : q_len;
  }
  // A row without keys has one tile all the same: somebody must write its zeros.
  __device__ __forceinline__ int tiles(int kv_len, int q_len) const {
    return max(1, ceil_div(kv_len, KEYS) - window.first_tile(kv_len, q_len));
  }
};
