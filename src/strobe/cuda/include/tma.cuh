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

// True for one lane of a converged warp: ptxas knows that, and does not look for others to copy for.
__device__ __forceinline__ bool elect_lane() {
  u32 elected;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.b32 %0, 1, 0, p;\n}" : "=r"(elected));
  return elected;
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

// The same for what is read once: its lines are the first that the L2 cache gives up.
__device__ __forceinline__ void tma_load_once(void* shared, const TensorMap& map, Barrier& full, int c0, int c1, int c2,
                                              int c3, int c4) {
  u64 policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(shared_address(shared)),
      "l"(&map), "r"(full.address()), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4), "l"(policy)
      : "memory");
}

// Copy a box from shared memory to the tensor; elements outside of it are left out. What ordinary stores wrote there
// needs fence_async_shared() first. Belongs to this thread's next bulk_commit().
__device__ __forceinline__ void tma_store(const TensorMap& map, const void* shared, int c0, int c1, int c2, int c3,
                                          int c4) {
  asm volatile("cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(&map),
               "r"(shared_address(shared)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
               : "memory");
}
__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Wait until the copy engine has read all that this thread committed: its shared memory may be written again.
__device__ __forceinline__ void bulk_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
