// A consumer's results on their way to global memory: out / sum, and lse.
//
// Defines: as cuda_hopper.cu.
#pragma once

#include "hopper_products.cuh"
#include "hopper_softmax.cuh"
#include "memory.cuh"
#include "mma.cuh"
#include "tma.cuh"

// c[i] of quad lane j and c[j] of quad lane i change places.
__device__ __forceinline__ void transpose_quad(u32 (&c)[4]) {
  const int lane = threadIdx.x % 32;
  const bool odd = lane & 1, upper = lane & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const u32 got = __shfl_xor_sync(~0u, odd ? c[i] : c[i + 1], 1);
    if (odd) c[i] = got; else c[i + 1] = got;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const u32 got = __shfl_xor_sync(~0u, upper ? c[i] : c[i + 2], 2);
    if (upper) c[i] = got; else c[i + 2] = got;
  }
}

// BULK_STORE: results that the copy engine is storing.
template <bool>
struct Outgoing {
  static constexpr int q_stage = -1;
  __device__ __forceinline__ Outgoing(const TensorMap&) {}
  __device__ __forceinline__ void leave(const scalar_t*, int, int, int, int) {}
};
template <>
struct Outgoing<true> {
  const TensorMap& map;
  int q_stage = -1;  // whose place in shared memory they take; -1: none have yet

  __device__ __forceinline__ Outgoing(const TensorMap& map) : map(map) {}
  __device__ __forceinline__ void leave(const scalar_t* tile, int stage, int row, int head, int batch) {
    q_stage = stage;
    if (threadIdx.x % 128 == 0) {
      tma_store(map, tile, 0, row, 0, head, batch);
      bulk_commit();
    }
  }
};

struct Results : Outgoing<BULK_STORE>, Products {
  float inverse[2];  // of the rows' sums, once settled

  __device__ __forceinline__ Results(const Params& p, Shared& s, const TensorMap& out)
      : Outgoing<BULK_STORE>(out), Products(p, s) {}

  // out / sum and lse. Quads trade their pairs of columns, so that a thread stores 16 bytes.
  __device__ __forceinline__ void store(const Work& work, Softmax& softmax) {
    if constexpr (BULK_STORE) return store_in_bulk(work, softmax);
    const float sink_log2 = SINKS ? p.sinks[work.head] * LOG2E : NEG_INF;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = token_of(work, half);
      float inverse, lse;
      softmax.finish(half, sink_log2, inverse, lse);
      scalar_t* row = p.out_row(work, token);
#pragma unroll
      for (int j = 0; j < HEAD_DIM / 8; j += 4) {
        u32 c[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
          c[i] = pack<scalar_t>(out[4 * (j + i) + 2 * half] * inverse, out[4 * (j + i) + 2 * half + 1] * inverse);
        transpose_quad(c);
        store_if(token < work.q_len, row + 8 * (j + lane() % 4), make_uint4(c[0], c[1], c[2], c[3]));
      }
      if (lane() % 4 == 0) p.store_lse(work, token, lse);
    }
  }

  // The same by way of shared memory, where this work's q was: no consumer reads that any more, and the copy engine
  // keeps to the tensor's rows.
  __device__ __forceinline__ void store_in_bulk(const Work& work, Softmax& softmax) {
    if (!SHORT_WORKS) settle(work, softmax);
    const int stage = (q_ring.stage + Q_STAGES - 1) % Q_STAGES;
    scalar_t* const tile = s.q[stage][consumer];
    const int row = threadIdx.x % 128 / 32 * 16 + lane() % 16;
#pragma unroll
    for (int j = 0; j < HEAD_DIM / 8; j += 2) {
      const u32 c[4] = {pack<scalar_t>(out[4 * j] * inverse[0], out[4 * j + 1] * inverse[0]),
                        pack<scalar_t>(out[4 * j + 2] * inverse[1], out[4 * j + 3] * inverse[1]),
                        pack<scalar_t>(out[4 * j + 4] * inverse[0], out[4 * j + 5] * inverse[0]),
                        pack<scalar_t>(out[4 * j + 6] * inverse[1], out[4 * j + 7] * inverse[1])};
      const int column = 8 * j + lane() / 16 * 8;
      store_matrices(shared_address(tile) + column / PANEL * Q_PANEL_BYTES + swizzled<SWIZZLE>(row, column % PANEL * 2),
                     c);
    }
    fence_async_shared();
    meet();
    leave(tile, stage, work.q_first_of(consumer), work.head, work.batch);
  }

  // Ahead of a store in bulk: lse, and what out is to be multiplied by.
  __device__ __forceinline__ void settle(const Work& work, const Softmax& softmax) {
    const float sink_log2 = SINKS ? p.sinks[work.head] * LOG2E : NEG_INF;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float lse;
      softmax.finish(half, sink_log2, inverse[half], lse);
      if (lane() % 4 == 0) p.store_lse(work, token_of(work, half), lse);
    }
  }

  // The last results have left the place of a q, which is free again. Only who sent them has to wait; at LATE_Q all do,
  // which saves a branch by thread.
  __device__ __forceinline__ void free_q() {
    if constexpr (LATE_Q) {
      if (q_stage >= 0) {
        bulk_wait_read();
        s.q_empty[q_stage][consumer].arrive_if(threadIdx.x % 128 == 0);
      }
    } else if (q_stage >= 0 && threadIdx.x % 128 == 0) {
      bulk_wait_read();
      s.q_empty[q_stage][consumer].arrive();
    }
  }
};
