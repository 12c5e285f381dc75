// The bulk tensor copy engine (TMA, sm_90): boxes of a tensor to shared memory, swizzled on the way.
#pragma once

#include "barrier.cuh"

// jit.tensor_map's result: a kernel parameter (`const __grid_constant__ TensorMap`), never copied.
struct alignas(64) TensorMap {
  u64 opaque[16];
};

__device__ __forceinline__ void prefetch(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Copy the box whose first element has these coordinates (innermost first). `full` is told of its bytes;
// elements outside the tensor arrive as zeros and count too.
__device__ __forceinline__ void tma_load(void* shared, const TensorMap& map, Barrier& full, int c0, int c1, int c2, int c3,
                                         int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(full.address()), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}
