// One query row in one warp: every lane holds FEATURES of its features, scores are sums over the warp.
#pragma once

#include "kv_source.cuh"
#include "reduce.cuh"

constexpr int FEATURES = HEAD_DIM / 32;

struct alignas(FEATURES % 4 ? 4 : FEATURES * 2) Features {
  u32 pairs[FEATURES / 2];
};

struct WarpRow {
  float q[FEATURES], out[FEATURES] = {};
  float maximum = NEG_INF, sum = 0.f;  // exponents of 2

  __device__ __forceinline__ static void load(const scalar_t* row, float (&x)[FEATURES]) {
    const Features raw = reinterpret_cast<const Features*>(row)[threadIdx.x % 32];
#pragma unroll
    for (int i = 0; i < FEATURES / 2; ++i) {
      const float2 pair = unpack<scalar_t>(raw.pairs[i]);
      x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
    }
  }

  __device__ __forceinline__ WarpRow(const scalar_t* query, float scale_log2) {
    load(query, q);
#pragma unroll
    for (float& x : q) x *= scale_log2;
  }

  // Keys first, first + step, ... before end (docs/math.md, eq. 5).
  template <class Rows>
  __device__ __forceinline__ void attend(const Rows& keys, const Rows& values, int first, int end, int step) {
    for (int key = first; key < end; key += step) {
      float k[FEATURES], v[FEATURES], score = 0.f;
      load(keys.at(key, true), k);
      load(values.at(key, true), v);
#pragma unroll
      for (int i = 0; i < FEATURES; ++i) score += q[i] * k[i];
      score = warp_sum(score);
      const float higher = fmaxf(maximum, score), old = fast_exp2(maximum - higher), weight = fast_exp2(score - higher);
      maximum = higher;
      sum = sum * old + weight;
#pragma unroll
      for (int i = 0; i < FEATURES; ++i) out[i] = out[i] * old + weight * v[i];
    }
  }
};

// The sum of shares of one row, each (o, m, l) over keys of its own (eq. 6): feature `d` of `shares` of them.
__device__ __forceinline__ float merge_feature(const float* o, const float* m, const float* l, int shares, int o_stride,
                                               int d, float& maximum, float& sum) {
  maximum = NEG_INF, sum = 0.f;
  for (int i = 0; i < shares; ++i) maximum = fmaxf(maximum, m[i]);
  float total = 0.f;
  for (int i = 0; i < shares; ++i) {
    if (m[i] == NEG_INF) continue;  // a share without keys
    const float weight = fast_exp2(m[i] - maximum);
    sum += weight * l[i];
    total += weight * o[i * o_stride + d];
  }
  return sum > 0.f ? total / sum : 0.f;
}

// One query a row over a paged cache: `DecodeParams` of strobe/attention/one_query.py.
struct DecodeParams {
  const scalar_t *q, *k, *v;  // k and v [pages, PAGE_SIZE, kv_heads, HEAD_DIM]
  scalar_t* out;              // like q: [batch, q_heads, HEAD_DIM]
  float* lse;                 // [batch, q_heads], or null
  const int *seq_lens, *page_table;
  i64 q_row, q_head, out_row, out_head, k_page, k_token, k_head, v_page, v_token, v_head;  // strides
  int table_stride, group;
  float scale_log2;

  using Rows = PagedRows<scalar_t, PAGE_SIZE>;
  __device__ __forceinline__ Rows keys(int row, int head) const {
    return {k + head / group * k_head, k_page, k_token, page_table + i64(row) * table_stride};
  }
  __device__ __forceinline__ Rows values(int row, int head) const {
    return {v + head / group * v_head, v_page, v_token, page_table + i64(row) * table_stride};
  }
  __device__ __forceinline__ const scalar_t* query(int row, int head) const { return q + row * q_row + head * q_head; }
  __device__ __forceinline__ void write(int row, int head, int d, float x) const {
    out[row * out_row + head * out_head + d] = from_float<scalar_t>(x);
  }
  __device__ __forceinline__ void write_lse(int row, int head, int heads, float maximum, float sum) const {
    if (lse) lse[row * heads + head] = sum > 0.f ? (maximum + fast_log2(sum)) * LN2 : NEG_INF;
  }
};
