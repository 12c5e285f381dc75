// A consumer's registers, and its matrix products: scores of the keys at k_ring, output of the values at v_ring.
//
// Defines: as cuda_hopper.cu.
#pragma once

#include "hopper_work.cuh"
#include "wgmma.cuh"

// Bytes from a K-major operand's start to its k-th step of 16.
__device__ __forceinline__ constexpr u32 k_major_step(int k, u32 panel_bytes) {
  return k * 16 / PANEL * panel_bytes + k * 16 % PANEL * 2;
}

struct Products {
  const Params& p;
  Shared& s;
  const int consumer = __shfl_sync(~0u, threadIdx.x / 128, 0) - 1;
  Ring<STAGES> k_ring, v_ring;
  Ring<Q_STAGES> q_ring;
  Ring<WORKS> work_ring;

  float scores[K_TILE / 2] = {};
  u32 weights[OVERLAP ? 2 : 1][K_TILE / 4] = {};  // while products still read one, the next step's go to the other
  float out[HEAD_DIM / 2] = {};
  int v_rows = 0;  // of the next values that are the row's own

  __device__ __forceinline__ Products(const Params& p, Shared& s) : p(p), s(s) {}

  // Issue the next key tile's scores and this one's output when it is this consumer's turn, and wait for the scores.
  template <int HELD = 0>
  __device__ __forceinline__ void take_turn() {
    s.k_full[k_ring.stage].wait(k_ring.parity);
    if (CONSUMERS > 1) named_sync<256>(1 + consumer);
    pin(scores);
    pin(out);
    issue_scores();
    issue_out<HELD>();
    end_turn();
    wgmma_wait<OVERLAP ? 1 : 0>();
    scores_done();
    if constexpr (!OVERLAP) out_done();
  }

  // The barrier of a turn counts two consumers: who ends its own, and who waits for the next.
  __device__ __forceinline__ void end_turn() {
    if (CONSUMERS > 1) named_arrive<256>(1 + (consumer + 1) % CONSUMERS);
  }

  // scores = q kᵀ
  __device__ __forceinline__ void issue_scores() {
    const u64 a = matrix_descriptor<SWIZZLE>(shared_address(s.q[q_ring.stage][consumer]), 16);
    const u64 b = matrix_descriptor<SWIZZLE>(shared_address(s.k[k_ring.stage]), 16);
    wgmma_fence();
    Wgmma<scalar_t, K_TILE>::template ss<false>(scores, a, b);
#pragma unroll
    for (int step = 1; step < HEAD_DIM / 16; ++step)
      Wgmma<scalar_t, K_TILE>::template ss<true>(scores, a + (k_major_step(step, Q_PANEL_BYTES) >> 4),
                                                 b + (k_major_step(step, KV_PANEL_BYTES) >> 4));
    wgmma_commit();
  }

  // out += weights v
  template <int HELD = 0>
  __device__ __forceinline__ void issue_out() {
    s.v_full[v_ring.stage].wait(v_ring.parity);
    if (FOREIGN_ROWS && v_rows < K_TILE) clear_foreign_values();
    const u64 b = matrix_descriptor<SWIZZLE>(shared_address(s.v[v_ring.stage]), V_ROWS * PANEL * 2);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < K_TILE / 16; ++step) {
      const u32(&w)[K_TILE / 4] = weights[HELD];
      const u32 a[4] = {w[4 * step], w[4 * step + 1], w[4 * step + 2], w[4 * step + 3]};
      Wgmma<scalar_t, HEAD_DIM>::rs(out, a, b + (v_row(step * 16) * 2 >> 4));
    }
    wgmma_commit();
    if (FOREIGN_ROWS) v_rows -= NEXT * K_TILE;
  }

  // Elements from a tile of values to a row of its first panel.
  static __device__ __forceinline__ constexpr int v_row(int row) {
    return row / V_ROWS * V_ROWS * HEAD_DIM + row % V_ROWS * PANEL;
  }

  // Others' values have weight 0, but 0 x NaN is NaN. Every consumer clears them all, so none waits for another.
  __device__ __forceinline__ void clear_foreign_values() {
    constexpr int CHUNKS = PANEL / 8;
    scalar_t* const tile = s.v[v_ring.stage];
#pragma unroll 1
    for (int i = v_rows * PANELS * CHUNKS + threadIdx.x % 128; i < K_TILE * PANELS * CHUNKS; i += 128) {
      const int panel = i / CHUNKS % PANELS;
      scalar_t* const row = tile + v_row(i / (CHUNKS * PANELS)) + panel * V_ROWS * PANEL;
      reinterpret_cast<uint4*>(row)[i % CHUNKS] = make_uint4(0, 0, 0, 0);
    }
    fence_async_shared();
    meet();
  }

  __device__ __forceinline__ void scores_done() {
    pin(scores);
    release(s.k_empty[k_ring.stage]);
    k_ring.advance();
  }
  __device__ __forceinline__ void out_done() {
    pin(out);
    release(s.v_empty[v_ring.stage]);
    v_ring.advance();
  }
  __device__ __forceinline__ void wait_for_out() {
    if constexpr (OVERLAP) {
      wgmma_wait<0>();
      out_done();
    }
  }

  __device__ __forceinline__ void clear_out() {
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 2; ++i) out[i] = 0.f;
  }
  __device__ __forceinline__ void leave_q() {
    if (!BULK_STORE) release(s.q_empty[q_ring.stage][consumer]);
    q_ring.advance();
  }
  __device__ __forceinline__ void release(Barrier& empty) {
    empty.arrive_if(lane() == 0);
  }

  // All warps of this consumer.
  __device__ __forceinline__ void meet() { named_sync<128>(1 + CONSUMERS + consumer); }

  static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }

  // The query of a thread's row `half`.
  __device__ __forceinline__ int token_of(const Work& work, int half) const {
    return work.q_first_of(consumer) + threadIdx.x % 128 / 32 * 16 + lane() / 4 + half * 8;
  }
};
