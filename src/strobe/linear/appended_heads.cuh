// Heads on their way from the product that makes them to attention: queries rotated, keys rotated into their pages, values
// into theirs.
//
// Defines: scalar_t; HEAD_DIM (0: the product's outputs are no heads), kv_t (the cache's element: scalar_t, or u8 for e4m3).
#pragma once

#include "types.cuh"

constexpr bool APPEND = HEAD_DIM > 0;
constexpr int HALF = APPEND ? HEAD_DIM / 2 : 1;  // between the two features that rope turns together

// Where heads go: first the queries', then the keys', then the values'.
struct Heads {
  const scalar_t *cos, *sin;       // [tokens, HEAD_DIM], sin negated in its first half
  const i64* slots;                // [tokens]
  kv_t *k_pages, *v_pages;         // [slots, kv_heads, HEAD_DIM]
  const float *k_scale, *v_scale;  // [kv_heads], or null: what a cache of e4m3 holds is divided by them
  int q_heads, kv_heads;
};

// Two features of a head, HALF apart: pair `unit` of a token's.
struct FeaturePair {
  scalar_t cos, sin;
  i64 slot;

  // Ask early for what is needed late.
  __device__ __forceinline__ void load(const Heads& to, int token, int unit) {
    const int head = unit / HALF, d = unit % HALF;
    if (head < to.q_heads + to.kv_heads) {
      cos = to.cos[i64(token) * HEAD_DIM + HALF + d];  // the same in both halves but for sin's sign
      sin = to.sin[i64(token) * HEAD_DIM + HALF + d];
    }
    if (head >= to.q_heads) slot = to.slots[token];
  }

  // x and y, unrotated; queries [tokens, q_heads, HEAD_DIM].
  __device__ __forceinline__ void store(const Heads& to, scalar_t* queries, int token, int unit, float x,
                                        float y) const {
    const int head = unit / HALF, d = unit % HALF, kv_head = head - to.q_heads;
    const bool is_value = kv_head >= to.kv_heads;
    if (!is_value) {
      const float c = to_float(cos), s = to_float(sin), turned = x * c - y * s;
      y = y * c + x * s;
      x = turned;
    }
    if (kv_head < 0) {
      write(queries + (i64(token) * to.q_heads + head) * HEAD_DIM + d, x, y, nullptr);
      return;
    }
    const int of = is_value ? kv_head - to.kv_heads : kv_head;
    const float* const scales = is_value ? to.v_scale : to.k_scale;
    write((is_value ? to.v_pages : to.k_pages) + (slot * to.kv_heads + of) * HEAD_DIM + d, x, y,
          scales ? scales + of : nullptr);
  }

 private:
  __device__ __forceinline__ static void write(scalar_t* at, float x, float y, const float*) {
    at[0] = from_float<scalar_t>(x), at[HALF] = from_float<scalar_t>(y);
  }
  __device__ __forceinline__ static void write(u8* at, float x, float y, const float* scale) {
    const float factor = scale ? 1.f / *scale : 1.f;
    const u16 pair = e4m3_pair(x * factor, y * factor);
    at[0] = u8(pair), at[HALF] = u8(pair >> 8);
  }
};
