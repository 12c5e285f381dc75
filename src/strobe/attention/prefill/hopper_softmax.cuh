// Scores to weights: online softmax that looks for a row's maximum only where its weights have grown too large.
//
// Defines: as cuda_hopper.cu.
#pragma once

#include "hopper_work.cuh"

// Online softmax of a consumer's rows; a thread holds columns of row `lane / 4` of its warp's 16 and of the eighth
// after it. Weights are 2^(score * scale_log2 - shift). out / sum does not depend on the shift, which only has to
// keep the weights within 16 bits; it is -inf while a row has seen no key.
struct Softmax {
  float scale_log2;
  float shift[2], sum[2], factor[2];

  __device__ __forceinline__ explicit Softmax(float scale_log2) : scale_log2(scale_log2) {
#pragma unroll
    for (int half = 0; half < 2; ++half) shift[half] = NEG_INF, sum[half] = 0.f;
  }

  // Weights of the scores, packed; true where the shift was raised, so that out must be scaled by `factor`, if not by
  // `scale_out`.
  template <bool FIRST, int N, class ScaleOut>
  __device__ __forceinline__ bool weigh(const float (&scores)[N], u32 (&weights)[N / 2], ScaleOut scale_out) {
    // Of a thread's weights: each is then far within f16, which ends at 65504, or within bf16 as it is.
    constexpr float MOST = FROM_ZERO ? 0x1p32f : 0x1p12f, LEAST = 0x1p-32f;
    float added[2];
    bool raised = true;
    if (FIRST && FROM_ZERO) {
      const float zero[2] = {0.f, 0.f};
      exponentials(scores, weights, zero, added);
      raised = __any_sync(~0u, !(added[0] + added[1] < MOST && fminf(added[0], added[1]) > LEAST));
      if (!raised) shift[0] = shift[1] = 0.f;
    } else if (!FIRST) {
      exponentials(scores, weights, shift, added);  // infinite or NaN where the row has seen no key
      raised = __any_sync(~0u, !(added[0] + added[1] < MOST));
    }
    if (raised) {
      raise(scores);
      const float finite[2] = {shift[0] == NEG_INF ? 0.f : shift[0], shift[1] == NEG_INF ? 0.f : shift[1]};
      exponentials(scores, weights, finite, added);
      scale_out();
    }
    sum[0] += added[0], sum[1] += added[1];
    return raised;
  }

  template <int N>
  __device__ __forceinline__ void exponentials(const float (&scores)[N], u32 (&weights)[N / 2], const float (&from)[2],
                                               float (&added)[2]) {
    added[0] = added[1] = 0.f;
#pragma unroll
    for (int j = 0; j < N; j += 2) {
      const int half = j / 2 % 2;
      const float low = fast_exp2(fmaf(scores[j], scale_log2, -from[half]));
      const float high = fast_exp2(fmaf(scores[j + 1], scale_log2, -from[half]));
      added[half] += low + high;
      weights[j / 2] = pack<scalar_t>(low, high);
    }
  }

  // Raise the shifts to the rows' maxima.
  template <int N>
  __device__ __forceinline__ void raise(const float (&scores)[N]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = fmaxf(scores[2 * half], scores[2 * half + 1]);
#pragma unroll
      for (int j = 4; j < N; j += 4) top = fmaxf(top, fmaxf(scores[j + 2 * half], scores[j + 2 * half + 1]));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
      const float higher = fmaxf(top * scale_log2, shift[half]);
      factor[half] = higher == NEG_INF ? 1.f : fast_exp2(shift[half] - higher);
      shift[half] = higher;
      sum[half] *= factor[half];
    }
  }

  // What out is to be multiplied by, and lse. `sink_log2` is one more exponent in the sum (-inf: none).
  __device__ __forceinline__ void finish(int half, float sink_log2, float& inverse, float& lse) const {
    float total = sum[half];
    total += __shfl_xor_sync(~0u, total, 1);
    total += __shfl_xor_sync(~0u, total, 2);
    float scale = 1.f, top = shift[half];
    if (SINKS) {
      top = fmaxf(shift[half], sink_log2);
      scale = top == NEG_INF ? 0.f : fast_exp2(shift[half] - top);
      total = total * scale + (top == NEG_INF ? 0.f : fast_exp2(sink_log2 - top));
    }
    inverse = total == 0.f ? 0.f : SHORT_WORKS ? __fdividef(scale, total) : scale / total;
    lse = top * LN2 + __logf(total);
  }
};
