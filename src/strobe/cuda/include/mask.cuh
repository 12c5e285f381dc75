// Which keys a query sees: a window around its diagonal, aligned bottom-right. Causal is a window with right = 0.
#pragma once

#include "types.cuh"

template <bool LEFT, bool RIGHT>
struct WindowMask {
  int kv_len;
  int diagonal;  // kv_len - q_len: query i stands at key i + diagonal
  int left, right;

  // The keys that query `token` sees: [first, end), empty where end <= first.
  __device__ __forceinline__ int first(int token) const {
    return LEFT ? max(0, token + diagonal - left) : 0;
  }
  __device__ __forceinline__ int end(int token) const {
    return RIGHT ? min(kv_len, token + diagonal + right + 1) : kv_len;
  }
};

// The key tiles [begin, end) that some query of [first_token, last_token] sees; all of them see every
// key of the tiles [full_begin, full_end), so only the others need masking.
struct KeyTiles {
  int begin, full_begin, full_end, end;

  template <int KEYS, typename Mask>
  static __device__ __forceinline__ KeyTiles of(const Mask& mask, int first_token, int last_token) {
    KeyTiles tiles;
    tiles.begin = mask.first(first_token) / KEYS;
    tiles.end = max(tiles.begin, ceil_div(max(0, mask.end(last_token)), KEYS));
    tiles.full_begin = min(tiles.end, ceil_div(mask.first(last_token), KEYS));
    tiles.full_end = max(tiles.full_begin, max(0, mask.end(first_token)) / KEYS);
    return tiles;
  }
};
