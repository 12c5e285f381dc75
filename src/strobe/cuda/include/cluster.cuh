// Thread-block clusters (sm_90 and later): blocks that run at the same time and read each other's shared
// memory. On earlier GPUs, and where a launch names no cluster, a block is a cluster of its own.
#pragma once

#include "types.cuh"

#if __CUDA_ARCH__ >= 900

__device__ __forceinline__ u32 cluster_rank() {
  u32 rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ u32 cluster_size() {
  u32 size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}
// All threads of all blocks meet; what they wrote before is seen by all after it. Remote shared memory
// lives until its block ends: blocks meet once more before the first may return.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The value at `p`, an address in this block's shared memory, in the block of that rank.
__device__ __forceinline__ u64 load_remote(const u64* p, u32 rank) {
  u64 value;
  asm volatile(
      "{\n.reg .b32 at;\n"
      "mapa.shared::cluster.u32 at, %1, %2;\n"
      "ld.shared::cluster.u64 %0, [at];\n}"
      : "=l"(value)
      : "r"(shared_address(p)), "r"(rank)
      : "memory");
  return value;
}
__device__ __forceinline__ float4 load_remote(const float4* p, u32 rank) {
  float4 x;
  asm volatile(
      "{\n.reg .b32 at;\n"
      "mapa.shared::cluster.u32 at, %4, %5;\n"
      "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [at];\n}"
      : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
      : "r"(shared_address(p)), "r"(rank)
      : "memory");
  return x;
}

#else

__device__ __forceinline__ u32 cluster_rank() { return 0; }
__device__ __forceinline__ u32 cluster_size() { return 1; }
__device__ __forceinline__ void cluster_sync() { __syncthreads(); }
__device__ __forceinline__ u64 load_remote(const u64* p, u32) { return *p; }
__device__ __forceinline__ float4 load_remote(const float4* p, u32) { return *p; }

#endif
