// The keys that a block of query rows sees in HEADS neighbouring key heads, as tiles of KEYS keys.
//
// Defines: KEYS, HEADS, WARPS; PAGE_SIZE, 0 where k and v are dense: a row is a page, whose number is the row's.
#pragma once

#include "types.cuh"

constexpr int THREADS = WARPS * 32;
constexpr int STEP = WARPS / HEADS;  // tiles that a block's warps take at a time

// a / b for quotients below 2^20: an estimate that is off by one at most, put right.
__device__ __forceinline__ u32 divide(u32 a, u32 b) {
  u32 quotient = u32(__fdividef(float(a), float(b)));
  const int rest = int(a - quotient * b);
  if (rest < 0) --quotient;
  if (rest >= int(b)) ++quotient;
  return quotient;
}

constexpr bool DENSE = PAGE_SIZE == 0;
constexpr int PAGE = DENSE ? 1 : PAGE_SIZE;

// Keys of each row.
struct Lengths {
  const int* seq_lens;
  int dense;

  __device__ __forceinline__ int operator[](int row) const { return DENSE ? dense : seq_lens[row]; }
};

struct Segment {
  int row, head;   // head counts groups of HEADS key heads times blocks of query rows
  int begin, end;  // its tiles, as its list counts them
  int first_key;   // of its first tile
  int kv_len, q_len, q_start;
};

struct Window {
  int left;  // below 0: none

  // The first tile that the row's first query sees.
  __device__ __forceinline__ int first_tile(int kv_len, int q_len) const {
    return left < 0 ? 0 : max(0, min(kv_len - 1, kv_len - q_len - left)) / KEYS;
  }
};
