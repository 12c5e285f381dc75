// Bulk copies of contiguous bytes (cp.async.bulk, sm_90): one thread asks, the copy engine does the rest.
#pragma once

#include "barrier.cuh"

// Copy `bytes` to shared memory; `full` is told of them. All three are multiples of 16.
__device__ __forceinline__ void bulk_copy(void* shared, const void* global, u32 bytes, Barrier& full) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(full.address())
               : "memory");
}
