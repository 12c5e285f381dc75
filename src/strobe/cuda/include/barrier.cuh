// Barriers in shared memory on which threads and the bulk copy engine meet (mbarrier, sm_90), and the
// numbered barriers on which some warps of a block do (bar.sync, bar.arrive).
#pragma once

#include "ring.cuh"
#include "types.cuh"

// Completes a phase once `count` arrivals and every expected byte have come in. Phases alternate between
// parity 0 and 1; waiting for the parity of a phase that is already over returns at once.
struct Barrier {
  u64 state;

  __device__ __forceinline__ u32 address() const { return shared_address(&state); }

  __device__ __forceinline__ void init(int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address()), "r"(count) : "memory");
  }
  __device__ __forceinline__ void arrive() {
    asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(address()) : "memory");
  }
  // By predicate, where a branch would let the compiler doubt that a warp goes on together.
  __device__ __forceinline__ void arrive_if(bool mine) {
    asm volatile(
        "{\n.reg .pred p;\n"
        "setp.ne.u32 p, %1, 0;\n"
        "@p mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];\n}" ::"r"(address()),
        "r"(u32(mine))
        : "memory");
  }
  // Arrive, and have this phase wait for `bytes` of bulk copies too.
  __device__ __forceinline__ void arrive_expecting(u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(address()), "r"(bytes)
                 : "memory");
  }
  __device__ __forceinline__ bool passed(u32 parity) const {
    u32 done;
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%1], %2;\n"
        "selp.b32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(address()), "r"(parity)
        : "memory");
    return done;
  }
  __device__ __forceinline__ void wait(u32 parity) const {
    while (!passed(parity)) {
    }
  }
};

// Make initialised barriers visible to the copy engine; a block barrier must follow.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Order this thread's ordinary accesses of shared memory before later ones of the copy engine and the tensor cores.
__device__ __forceinline__ void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Numbered barriers: 0 is __syncthreads'. COUNT has those that sync and those that only arrive.
template <int COUNT>
__device__ __forceinline__ void named_sync(int id) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(COUNT) : "memory");
}
template <int COUNT>
__device__ __forceinline__ void named_arrive(int id) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "n"(COUNT) : "memory");
}

// Hand registers back to, or take them from, the block's pool: each warpgroup as a whole.
template <int COUNT>
__device__ __forceinline__ void shrink_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
__device__ __forceinline__ void grow_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
