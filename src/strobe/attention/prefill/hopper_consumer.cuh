// A consumer: one warpgroup with 64 queries of each work, whose scores, weights and output stay in its registers.
//
// Defines: as cuda_hopper.cu.
#pragma once

#include "hopper_results.cuh"

struct Consumer : Results {
  using Results::Results;

  __device__ __forceinline__ void run() {
    if (consumer == CONSUMERS - 1) end_turn();  // the first turn is consumer 0's
    const Work* work = next_work();
    if (!work) return;
    Softmax softmax(p.scale_log2);
    begin(*work, softmax);
    while (true) {
      steps(*work, softmax);
      const Work* coming = FOLDED ? nullptr : next_work();
      if (!coming) break;
      turn_over(*work, softmax, *coming);
      __syncwarp();
      release(s.work_empty[work - s.work]);
      work = coming;
    }
    finish(*work, softmax);
    if (BULK_STORE && threadIdx.x % 128 == 0) bulk_wait_read();
  }

  // Null after the last.
  __device__ __forceinline__ const Work* next_work() {
    const Work& work = s.work[work_ring.stage];
    s.work_full[work_ring.stage].wait(work_ring.parity);
    work_ring.advance();
    return work.head < 0 ? nullptr : &work;
  }

  // A work's first weights, with no output yet.
  __device__ __forceinline__ void begin(const Work& work, Softmax& softmax) {
    if (FOLDED) pass_over(work);
    s.q_full[q_ring.stage][consumer].wait(q_ring.parity);
    s.k_full[k_ring.stage].wait(k_ring.parity);
    pin(scores);
    issue_scores();
    wgmma_wait<0>();
    scores_done();
    first_weights(work, softmax);
    clear_out();
    take_weights();
    v_rows = work.kv_len - first_of(work.keys_of(consumer)) * K_TILE;
  }

  // OWN_KEYS: the key tiles that only other consumers see, and their turns.
  __device__ __forceinline__ void pass_over(const Work& work) {
    for (int i = work.unseen_by(consumer); i > 0; --i) pass_key_tile(), pass_value_tile();
  }
  __device__ __forceinline__ void pass_keys(const Work& work) {
    for (int i = work.unseen_by(consumer); i > 0; --i) pass_key_tile();
  }
  __device__ __forceinline__ void pass_values(const Work& work) {
    for (int i = work.unseen_by(consumer); i > 0; --i) pass_value_tile();
  }
  __device__ __forceinline__ void pass_key_tile() {
    s.k_full[k_ring.stage].wait(k_ring.parity);
    named_sync<256>(1 + consumer);
    end_turn();
    release(s.k_empty[k_ring.stage]);
    k_ring.advance();
  }
  __device__ __forceinline__ void pass_value_tile() {
    s.v_full[v_ring.stage].wait(v_ring.parity);
    __syncwarp();
    release(s.v_empty[v_ring.stage]);
    v_ring.advance();
  }

  // All key tiles after the first: those at the window's left end, the full ones, those of the diagonal; or from right to
  // left.
  __device__ __forceinline__ void steps(const Work& work, Softmax& softmax) {
    // Three loops would spill there: one masks them all.
    constexpr bool MASK_ALL = HEAD_DIM == 256 && HAS_LEFT && HAS_RIGHT;
    const Bounds keys = work.keys_of(consumer);
    int n = first_of(keys) + NEXT;
    if constexpr (ASCENDING) {
      if constexpr (!MASK_ALL) {
        if (HAS_LEFT)
          for (; n < keys.full_begin; ++n) step<true>(work, softmax, keys, n);
        if (PAIRS)
          for (; n + 1 < keys.full_end; n += 2) pair(work, softmax, keys, n);
        for (; n < keys.full_end; ++n) step<false>(work, softmax, keys, n);
      }
      for (; n < keys.end; ++n) step<true>(work, softmax, keys, n);
    } else {
      if (HAS_RIGHT)
        for (; n >= max(keys.begin, keys.full_end); --n) step<true>(work, softmax, keys, n);
      if constexpr (OVERLAP) {
        const int full_begin = HAS_LEFT ? keys.full_begin : keys.begin;
        if (PAIRS)
          for (; n - 1 >= full_begin; n -= 2) pair(work, softmax, keys, n);
        for (; n >= full_begin; --n) step<false>(work, softmax, keys, n);
      } else {  // three consumers: the bound was not timed in a register
        for (; n >= (HAS_LEFT ? keys.full_begin : keys.begin); --n) step<false>(work, softmax, keys, n);
      }
      if (HAS_LEFT)
        for (; n >= keys.begin; --n) step<true>(work, softmax, keys, n);
    }
    if (LATE_Q) leave_q(), free_q();
    else if (keys.begin == keys.end - 1) leave_q();
  }

  __device__ __forceinline__ void pair(const Work& work, Softmax& softmax, const KeyTiles& keys, int n) {
    weigh_tile<false, 0>(work, softmax, keys, n);
    weigh_tile<false, 1>(work, softmax, keys, n + NEXT);
  }

  template <bool MASKED>
  __device__ __forceinline__ void step(const Work& work, Softmax& softmax, const KeyTiles& keys, int n) {
    weigh_tile<MASKED, 0>(work, softmax, keys, n);
    take_weights();
  }

  // The scores of key tile n, and under them the output of the tile before, by the weights that are HELD.
  template <bool MASKED, int HELD>
  __device__ __forceinline__ void weigh_tile(const Work& work, Softmax& softmax, const KeyTiles& keys, int n) {
    take_turn<HELD>();
    if (!LATE_Q && n == last_of(keys)) leave_q();
    cap_scores();
    if (MASKED) mask_scores(work, n);
    const auto scale_out = [&] {
#pragma unroll
      for (int j = 0; j < HEAD_DIM / 2; ++j) out[j] *= softmax.factor[j / 2 % 2];
    };
    if constexpr (OVERLAP) {
      weigh<false, HELD>(softmax, [&] {
        wgmma_wait<0>();
        pin(out);
        scale_out();
      });
      wait_for_out();
    } else if (weigh<false, HELD>(softmax, [] {})) {
      scale_out();  // within weigh, and with free_q by predicate, causal works took three consumers 4 to 6 % longer
    }
    if (BULK_STORE && !LATE_Q && n == first_of(keys) + NEXT) free_q();
  }

  // The next work's first scores, and under them the last output of this one.
  __device__ __forceinline__ void turn_over(const Work& work, Softmax& softmax, const Work& coming) {
    if (BULK_STORE && !LATE_Q && work.keys_of(consumer).begin == work.keys_of(consumer).end - 1) free_q();
    if (OWN_KEYS) pass_keys(work);
    if (SHORT_WORKS) settle(work, softmax);
    s.q_full[q_ring.stage][consumer].wait(q_ring.parity);
    take_turn();
    if constexpr (!OVERLAP) {
      if (OWN_KEYS) pass_values(work);
      store(work, softmax);
    }
    Softmax fresh(p.scale_log2);
    first_weights(coming, fresh);
    if constexpr (OVERLAP) {
      wait_for_out();
      if (OWN_KEYS) pass_values(work);
      store(work, softmax);
    }
    clear_out();
    take_weights();
    v_rows = coming.kv_len - first_of(coming.keys_of(consumer)) * K_TILE;
    softmax = fresh;
  }

  __device__ __forceinline__ void finish(const Work& work, Softmax& softmax) {
    pin(out);
    issue_out();
    if (SHORT_WORKS) settle(work, softmax);
    wgmma_wait<0>();
    out_done();
    if (OWN_KEYS && !FOLDED) pass_over(work);
    if (BULK_STORE) meet();  // all warps are done with q
    store(work, softmax);
  }

  // --- scores to weights

  __device__ __forceinline__ void first_weights(const Work& work, Softmax& softmax) {
    const KeyTiles& keys = work.keys_of(consumer);
    cap_scores();
    const int n = first_of(keys);
    if (n < keys.full_begin || n >= keys.full_end) mask_scores(work, n);
    weigh<true, 0>(softmax, [] {});
  }

  template <bool FIRST, int HELD, class ScaleOut>
  __device__ __forceinline__ bool weigh(Softmax& softmax, ScaleOut scale_out) {
    return softmax.weigh<FIRST>(scores, weights[OVERLAP ? 1 - HELD : 0], scale_out);
  }

  // `zero` is 0, but the compiler cannot know: it would let both arrays share registers, and then would have to
  // serialise the products that still read them (ptxas C7513).
  __device__ __forceinline__ void take_weights() {
    if constexpr (OVERLAP) {
#pragma unroll
      for (int i = 0; i < K_TILE / 4; ++i) weights[0][i] = weights[1][i] ^ u32(p.zero);
    }
  }

  __device__ __forceinline__ void cap_scores() {
    if (SOFTCAP) {
#pragma unroll
      for (int i = 0; i < K_TILE / 2; ++i) scores[i] = fast_tanh(scores[i] * p.softcap_scale);
    }
  }

  __device__ __forceinline__ void mask_scores(const Work& work, int n) {
    const auto mask = work.mask(p);
    const int column = n * K_TILE + lane() % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = token_of(work, half);
      const int first = mask.first(token) - column, end = mask.end(token) - column;
#pragma unroll
      for (int j = 0; j < K_TILE / 8; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          if (8 * j + i >= end || (HAS_LEFT && 8 * j + i < first)) scores[4 * j + 2 * half + i] = NEG_INF;
    }
  }
};
