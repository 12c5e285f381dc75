// What blocks leave of a segment that they share, and how it is added up: same inputs, same bits. A partial tells by
// itself when it is there, so nobody counts or fences: an empty word is a NaN that arithmetic never makes.
//
// Defines: as attend_tile.cuh.
#pragma once

#include "memory.cuh"
#include "shares.cuh"

constexpr u32 FAN = 16;   // partials that a block adds up
constexpr int BATCH = 8;  // of them that a thread loads at once
constexpr int ITEMS = HEADS * COLUMNS * (HEAD_DIM / 4);

// What one block, or FAN of them, leave of a segment. Each item has its own m and l, so that a thread polls, adds up and
// empties its own words and no others.
struct Partial {
  float4 o[ITEMS];
  float2 ml[ITEMS];
};

// A block leaves at most one of each: of a segment that began before its share, that begins in it; of FAN blocks.
enum Kind { CONTINUES, BEGINS, ADDED_UP, KINDS };

__device__ __forceinline__ Partial& partial(const Params& p, u32 block, u32 kind) {
  return reinterpret_cast<Partial*>(p.partials)[block * KINDS + kind];
}

constexpr u32 EMPTY = 0xffffffff;  // a word that nobody has written; arithmetic makes the NaN 0x7fffffff only

__device__ __forceinline__ float written(float x) {
  return __float_as_uint(x) == EMPTY ? __uint_as_float(EMPTY >> 1) : x;
}

// The largest word: EMPTY where some word is.
__device__ __forceinline__ u32 largest(float2 x) { return max(__float_as_uint(x.x), __float_as_uint(x.y)); }
__device__ __forceinline__ u32 largest(float4 x) { return max(largest(float2{x.x, x.y}), largest(float2{x.z, x.w})); }

// An item's sum, written out where it is that of all keys, else left for others.
__device__ __forceinline__ void leave(const Params& p, const Segment& s, Rows rows, int i, const Sum& sum, bool complete,
                                      Partial& to) {
  if (complete) {
    const Item at(i, rows.count);
    rows.kv_head += at.key_head - int(threadIdx.x / 32 % HEADS);
    finish(p, s, rows, at.row, at.dim, sum);
  } else {
    to.o[i] = make_float4(written(sum.o.x), written(sum.o.y), written(sum.o.z), written(sum.o.w));
    to.ml[i] = make_float2(written(sum.m), written(sum.l));
  }
}

// The blocks that share a segment. The last of every FAN adds up theirs, the last of all adds up its own group's and
// what the other groups' have left. So a block waits for lower ones only.
struct Sharers {
  u32 first, last;

  __device__ __forceinline__ bool adds_up(u32 block) const { return block == last || (block - first) % FAN == FAN - 1; }
};

// What one block adds up, in this order: sums of groups, partials of blocks; not its own where it `holds` that still.
struct Addends {
  u32 groups, count;
  u32 first, begin;  // block of the segment, of the partials

  __device__ __forceinline__ Addends(const Sharers& sharers, u32 block, bool holds) : first(sharers.first) {
    const u32 ahead = (block - first) / FAN;
    groups = block == sharers.last ? ahead : 0;
    begin = first + ahead * FAN;
    count = groups + block - begin + !holds;
  }
  __device__ __forceinline__ Partial& at(const Params& p, u32 j) const {
    if (j < groups) return partial(p, first + j * FAN + FAN - 1, ADDED_UP);
    const u32 block = begin + j - groups;
    return partial(p, block, block == first ? BEGINS : CONTINUES);
  }
};

// The sum of an item's addends from, from + 1, ..., BATCH at most, of `sum`, and of the warps' shares where `own` is not
// null. Leaves the addends' places empty. Loads depend on nothing, so that all are under way at once: where there
// are fewer addends, the last is loaded again.
__device__ __forceinline__ void take(const Params& p, const Addends& addends, u32 from, const Shares* own, int i,
                                     const Item& item, Sum& sum) {
  const float nothing = __uint_as_float(EMPTY);
  Partial* at[BATCH];
  float4 o[BATCH];
  float2 ml[BATCH];
#pragma unroll
  for (int j = 0; j < BATCH; ++j) at[j] = &addends.at(p, min(from + j, addends.count - 1));
  for (bool first = true;; first = false) {
#pragma unroll
    for (int j = 0; j < BATCH; ++j) o[j] = load_relaxed(at[j]->o + i), ml[j] = load_relaxed(at[j]->ml + i);
    if (own && first) sum = sum_warps(*own, item);
    u32 most = 0;
#pragma unroll
    for (int j = 0; j < BATCH; ++j) most = max(most, max(largest(o[j]), largest(ml[j])));
    if (most != EMPTY) break;
  }
  float m = sum.m;
#pragma unroll
  for (int j = 0; j < BATCH; ++j) {
    if (from + j >= addends.count) ml[j] = make_float2(UNSEEN, 0.f), o[j] = make_float4(0.f, 0.f, 0.f, 0.f);
    m = fmaxf(m, ml[j].x);
  }
  sum.raise(m);
#pragma unroll
  for (int j = 0; j < BATCH; ++j) {
    sum.add(fast_exp2(ml[j].x - m), ml[j].y, o[j]);
    at[j]->o[i] = make_float4(nothing, nothing, nothing, nothing);
    at[j]->ml[i] = make_float2(nothing, nothing);
  }
}

// Add up what a block of a segment adds up. `sums` is shared memory. Threads to spare form teams that divide the
// addends among themselves. This runs once, with nothing to hide behind.
__device__ __forceinline__ void merge(const Params& p, const Shares& shares, u32 block, const Sharers& sharers,
                                      bool holds, Sum* sums, const Segment& s, const Rows& rows) {
  if (rows.count <= 0) return;  // a packed row with fewer queries than others
  const Addends addends(sharers, block, holds);
  const u32 items = Item::count(rows.count);
  const u32 teams = items >= THREADS ? 1 : divide(THREADS, items), team = divide(threadIdx.x, items);
#pragma unroll 1
  for (u32 turn = 0; turn < items; turn += THREADS) {
    const u32 i = turn + threadIdx.x - (teams > 1 ? team * items : 0);
    Sum sum;
    if (i < items && team < teams) {
#pragma unroll 1
      for (u32 from = team * BATCH; from < addends.count; from += teams * BATCH)
        take(p, addends, from, holds && from == 0 ? &shares : nullptr, i, Item(i, rows.count), sum);
    }
    if (teams > 1) {
      sums[threadIdx.x] = sum;
      __syncthreads();
    }
    if (i < items && team == 0) {
#pragma unroll 1
      for (u32 other = 1; other < min(teams, ceil_div(addends.count, BATCH)); ++other) sum.join(sums[other * items + i]);
      leave(p, s, rows, i, sum, block == sharers.last, partial(p, block, ADDED_UP));
    }
  }
}
