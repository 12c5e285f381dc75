// Rows of 16-bit elements in shared memory, swizzled so that neither ldmatrix nor 16-byte copies meet
// a bank conflict.
//
// A row is cut into chunks of 16 bytes; eight chunks span all 32 banks. ldmatrix reads one chunk of each
// of eight neighbouring rows at a time, so these eight must stand in eight different bank groups. The
// pitch already spreads them over 8 / SPAN groups; XOR-ing the chunk's number with the row's does the rest.
#pragma once

#include "async_copy.cuh"

template <int DIM>
struct SharedTile {
  static_assert(DIM % 16 == 0, "rows are whole mma steps");
  static constexpr int CHUNKS = DIM / 8;
  static constexpr int ROW_BYTES = DIM * 2;
  static constexpr int SPAN = CHUNKS % 8 == 0 ? 8 : CHUNKS % 4 == 0 ? 4 : 2;

  // Bytes from the tile's start, which is aligned to 128.
  static __device__ __forceinline__ u32 offset(int row, int chunk) {
    return row * ROW_BYTES + (chunk ^ (row / (8 / SPAN)) % SPAN) * 16;
  }

  // From the address of chunk 0 or 1 of a row to the same chunk `steps` mma steps (of 16 elements) on.
  static __device__ __forceinline__ u32 advance(u32 address, int steps) {
    const int chunk = 2 * steps;
    return (address ^ chunk % SPAN * 16) + chunk / SPAN * SPAN * 16;
  }

  // Start copying rows [first, first + ROWS) of `source`. Rows from `end` on become zeros, so that no NaN
  // that stands there meets a weight of 0.
  template <int ROWS, int THREADS, typename Source>
  static __device__ __forceinline__ void load(u32 tile, const Source& source, int first, int end) {
    constexpr int PIECES = ROWS * CHUNKS;
#pragma unroll
    for (int pass = 0; pass < ceil_div(PIECES, THREADS); ++pass) {
      // where THREADS is a multiple of CHUNKS, a thread keeps its chunk and every row is a constant step on
      constexpr bool EVEN = THREADS % CHUNKS == 0;
      const int piece = threadIdx.x + pass * THREADS;
      const int row = EVEN ? threadIdx.x / CHUNKS + pass * (THREADS / CHUNKS) : piece / CHUNKS;
      const int chunk = EVEN ? threadIdx.x % CHUNKS : piece % CHUNKS;
      const bool valid = first + row < end;
      if (PIECES % THREADS == 0 || piece < PIECES)
        copy_async_16(tile + offset(row, chunk), source.at(first + row, valid) + chunk * 8, valid);
    }
  }
};
