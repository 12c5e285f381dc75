// Online softmax on mma accumulators (docs/math.md, equation 5): a running reference and sum for each row.
#pragma once

#include "reduce.cuh"

// The state of M_TILES x 16 rows held by one warp. A lane holds two rows of each m-tile, `half` 0 and 1;
// the four lanes of a quad hold the same rows.
//
// `reference` stands in for the row's maximum. It only has to be near it: exponents up to 2^8 above it
// are harmless in every format used, and out and sum are rescaled only where the maximum has outgrown it
// by more (FlashAttention-4's conditional rescaling; exact, since out / sum does not depend on it).
//
// Scores become exponents of 2 by `scale` (softmax scale x log2(e)), which is above 0.
template <int M_TILES>
struct OnlineSoftmax {
  float reference[M_TILES][2];  // as an exponent; -inf while the row has seen no key
  float sum[M_TILES][2];        // over this lane's columns only, until `finish`

  __device__ __forceinline__ OnlineSoftmax() {
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        reference[m][half] = NEG_INF;
        sum[m][half] = 0.0f;
      }
  }

  // What exponents are taken against: any finite number will do for a row that has seen no key.
  __device__ __forceinline__ float shift(int m, int half) const {
    return reference[m][half] == NEG_INF ? 0.0f : reference[m][half];
  }

  // Raise the reference where `scores` have outgrown it, and rescale `out` and the sum to the new one.
  template <int N_TILES, int OUT_TILES>
  __device__ __forceinline__ void observe(const float (&scores)[M_TILES][N_TILES][4], float scale,
                                          float (&out)[M_TILES][OUT_TILES][4]) {
    float highest[M_TILES][2];
    bool outgrown = false;
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float top = scores[m][0][2 * half];
#pragma unroll
        for (int n = 0; n < N_TILES; ++n)
          top = fmaxf(top, fmaxf(scores[m][n][2 * half], scores[m][n][2 * half + 1]));
        highest[m][half] = top * scale;
        outgrown |= highest[m][half] > reference[m][half] + 8.0f;
      }
    if (__any_sync(~0u, outgrown)) rescale(highest, out);
  }

  template <int OUT_TILES>
  __device__ __forceinline__ void rescale(const float (&highest)[M_TILES][2], float (&out)[M_TILES][OUT_TILES][4]) {
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float before = reference[m][half];
        reference[m][half] = fmaxf(before, warp_max<4>(highest[m][half]));
        const float factor = fast_exp2(before - shift(m, half));  // 0 at a row's first keys
        sum[m][half] *= factor;
#pragma unroll
        for (int d = 0; d < OUT_TILES; ++d) {
          out[m][d][2 * half] *= factor;
          out[m][d][2 * half + 1] *= factor;
        }
      }
  }

  // The weights of 16 columns of m-tile `m` as an A operand; they are added to the sum.
  template <typename T>
  __device__ __forceinline__ void weights(int m, const float (&left)[4], const float (&right)[4], float scale,
                                          u32 (&a)[4]) {
    float w[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int half = i / 2 % 2;
      w[i] = fast_exp2(fmaf(i < 4 ? left[i] : right[i - 4], scale, -shift(m, half)));
      sum[m][half] += w[i];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = pack<T>(w[2 * i], w[2 * i + 1]);
  }

  // Add up the quad's shares of the sums.
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) sum[m][half] = warp_sum<4>(sum[m][half]);
  }
};
