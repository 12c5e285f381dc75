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

  // ROWS rows are moved in PASSES passes, in which each of THREADS threads has one piece of 16 bytes.
  template <int ROWS, int THREADS>
  static constexpr int PASSES = ceil_div(ROWS * CHUNKS, THREADS);

  // Call `piece(row, chunk)` for this thread's piece in `pass`.
  template <int ROWS, int THREADS, typename Piece>
  static __device__ __forceinline__ void visit(int pass, const Piece& piece) {
    const int i = threadIdx.x + pass * THREADS;
    if (ROWS * CHUNKS % THREADS != 0 && i >= ROWS * CHUNKS) return;
    if (THREADS % CHUNKS == 0)  // a thread keeps its chunk, and its rows are a constant step apart
      piece(threadIdx.x / CHUNKS + pass * (THREADS / CHUNKS), threadIdx.x % CHUNKS);
    else
      piece(i / CHUNKS, i % CHUNKS);
  }
};
