// The order in which a persistent grid takes its tiles of queries.
#pragma once

#include "types.cuh"

// Heads come in sections whose keys and values fit in L2 together; within a section the tiles that see the most
// keys (the last ones, when causal) come first, so that the short ones fill the gaps at the end.
struct TileOrder {
  int q_tiles;  // of a head
  int heads;    // batch x q_heads
  int section;  // heads of a section

  struct Tile {
    int head, q_tile;
  };

  __device__ __forceinline__ int count() const { return q_tiles * heads; }

  __device__ __forceinline__ Tile at(int index) const {
    const int first = index / (section * q_tiles) * section;
    const int rest = index - first * q_tiles;
    const int width = min(section, heads - first);
    return {first + rest % width, q_tiles - 1 - rest / width};
  }
};

// The same over rows of different lengths laid end to end, and only tiles that hold queries: row by row, each from its
// last tile to its first, the heads of a tile one after the other. A whole warp asks, for indices that ascend.
template <int QUERIES>
struct PackedTileOrder {
  const int* cu_seqlens;  // [rows + 1]
  int rows, heads;        // heads: of a row
  int row = 0, before = 0;  // where the search stands: 32 rows from `row` on, and the tiles of a head ahead of them

  // Head -1: there is no such tile, and `before` are all.
  __device__ __forceinline__ TileOrder::Tile at(int index) {
    const int tile = index / heads, lane = threadIdx.x % 32;
    for (; row < rows; row += 32) {
      const int mine = row + lane;
      int upto = mine < rows ? ceil_div(cu_seqlens[mine + 1] - cu_seqlens[mine], QUERIES) : 0;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int below = __shfl_up_sync(~0u, upto, step);
        if (lane >= step) upto += below;
      }
      const unsigned reached = __ballot_sync(~0u, before + upto > tile);
      if (reached) {
        const int found = __ffs(reached) - 1;
        return {(row + found) * heads + index % heads, before + __shfl_sync(~0u, upto, found) - 1 - tile};
      }
      before += __shfl_sync(~0u, upto, 31);
    }
    return {-1, 0};
  }
};
