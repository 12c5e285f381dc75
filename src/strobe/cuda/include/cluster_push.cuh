// Stores into the shared memory of another block of the cluster (st.async, sm_90): they tell a barrier there that they
// have come. No fence is needed; one at the cluster's scope waits for all that a thread has under way.
#pragma once

#include "barrier.cuh"

// The two halves of a meeting of all threads of all blocks, which orders nothing but what fence_barrier_init() has made
// visible: behind it the barriers of all blocks can be told. Who is still to be told must not have ended.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }

// Store at `p`, an address in this block's shared memory, in the block of that rank, whose `full` is told of the bytes.
__device__ __forceinline__ void push(float4* p, float4 x, Barrier& full, u32 rank) {
  asm volatile(
      "{\n.reg .b32 at, told;\n"
      "mapa.shared::cluster.u32 at, %0, %2;\n"
      "mapa.shared::cluster.u32 told, %1, %2;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [at], {%3, %4, %5, %6}, [told];\n}" ::"r"(
          shared_address(p)),
      "r"(full.address()), "r"(rank), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w)
      : "memory");
}
__device__ __forceinline__ void push(float2* p, float2 x, Barrier& full, u32 rank) {
  asm volatile(
      "{\n.reg .b32 at, told;\n"
      "mapa.shared::cluster.u32 at, %0, %2;\n"
      "mapa.shared::cluster.u32 told, %1, %2;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [at], {%3, %4}, [told];\n}" ::"r"(
          shared_address(p)),
      "r"(full.address()), "r"(rank), "f"(x.x), "f"(x.y)
      : "memory");
}
