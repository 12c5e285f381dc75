// A ring of buffers between a producer and a consumer, each buffer with a full and an empty barrier.
#pragma once

#include "types.cuh"

// Where a producer or a consumer stands in a ring of SLOTS buffers.
template <int SLOTS>
struct Ring {
  int stage = 0;
  u32 parity = 0;  // of the full barrier's phase to wait for; a producer waits for the empty barrier's other one

  __device__ __forceinline__ void advance() {
    if (++stage == SLOTS) stage = 0, parity ^= 1;
  }
};
