// The parameter of the kernels that work on dense tensors: `DenseParams` of strobe/attention/dense.py.
#pragma once

#include "types.cuh"

struct Strides {
  i64 batch, row, head;  // in elements; a row is contiguous
};

struct DenseParams {
  const scalar_t *q, *k, *v;
  scalar_t* out;
  float* lse;  // [batch, q_heads, q_len], or null: not wanted
  Strides q_strides, k_strides, v_strides, out_strides;
  int q_len, kv_len, q_heads, group;
  int causal;
  float scale_log2e;  // scores times this are exponents of 2 (docs/math.md, eq. 5, in base two)

  __device__ __forceinline__ const scalar_t* queries(int batch, int head) const {
    return q + batch * q_strides.batch + head * q_strides.head;
  }
  __device__ __forceinline__ const scalar_t* keys(int batch, int head) const {
    return k + batch * k_strides.batch + head / group * k_strides.head;
  }
  __device__ __forceinline__ const scalar_t* values(int batch, int head) const {
    return v + batch * v_strides.batch + head / group * v_strides.head;
  }
  __device__ __forceinline__ scalar_t* out_row(int batch, int head, int row) const {
    return out + batch * out_strides.batch + head * out_strides.head + row * out_strides.row;
  }
  __device__ __forceinline__ i64 lse_index(int batch, int head, int row) const {
    return (i64(batch) * q_heads + head) * q_len + row;
  }
  // Query `row` sees keys [0, visible(row)) (docs/math.md, eq. 1).
  __device__ __forceinline__ int visible(int row) const {
    return causal ? max(0, min(kv_len, row + kv_len - q_len + 1)) : kv_len;
  }
};

// A causal query sees more keys the later it stands: blocks take the last, longest tiles first, so that
// the short ones fill the gaps at the end.
__device__ __forceinline__ int longest_first() { return gridDim.x - 1 - blockIdx.x; }

// exp2(before - after), the factor on what was summed against an older maximum (eq. 5). Nothing seen
// yet (before = -inf) gives 0, also where after = -inf.
__device__ __forceinline__ float rescale_factor(float before, float after) {
  return before == NEG_INF ? 0.f : fast_exp2(before - after);
}

// What exponents are taken against: for a row that has seen no key any finite number will do.
__device__ __forceinline__ float finite(float maximum) { return maximum == NEG_INF ? 0.f : maximum; }

// ln(sum over keys of exp(score)) from a maximum in base two and the sum against it.
__device__ __forceinline__ float log_sum_exp(float maximum, float sum) {
  return sum > 0.f ? LN2 * (maximum + fast_log2(sum)) : NEG_INF;
}
