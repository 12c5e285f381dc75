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
