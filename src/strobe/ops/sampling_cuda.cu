// Tokens from logits without a sort: a cluster of blocks draws a row, each holding a slice of it.
//
// A row is read once; what follows works on the slices, in shared memory. Filters are threshold searches: a histogram
// over 8 bits of the floats' own patterns narrows the threshold by a digit, so four rounds find it to the last bit,
// ties included. The draw inverts the cumulative distribution in the order of the token ids.
//
// Probabilities are summed as integers (`mass`), and integer sums do not depend on their order: a row draws the same
// token however many blocks share it, and whatever else is in the batch.
#include "cluster.cuh"
#include "grid_dependency.cuh"

constexpr int THREADS = 512, WARPS = THREADS / 32;
constexpr int DIGIT = 8, BINS = 1 << DIGIT;
static_assert(BINS <= THREADS);
constexpr int COPIES = 8;       // of the histogram: logits crowd in a few octaves, whose bins many lanes meet
constexpr int MASS_BITS = 44;   // the likeliest token weighs 2^44, and 2^18 of them fit 64 bits
constexpr int PADDING = 16;     // values beside a slice's own, so that it begins and ends on 16 bytes
constexpr u32 ANYTHING = ~0u;   // a limit that keeps every key

// How one row is drawn (ROW of sampling_cuda.py).
struct Row {
  u64 stream;             // where the seed's numbers start
  int* counts;            // [vocab]: 2 x how often it is in the output, + 1 where it is in the prompt; or null
  int position;           // tokens drawn before: the kernel counts it on
  int min_tokens;         // before as many, `forbidden` tokens may not come
  float temperature;      // 0: the likeliest
  float top_p, log_min_p;
  int top_k;
  float repetition, presence, frequency;
  int edits;              // where in `edits` the row's own begin: `biases` of them, then `forbidden`
  int biases, forbidden;
  int mask;               // the row of `allowed`, or -1
};
struct Edit {
  int token;
  float bias;
};

struct Sample {
  const scalar_t* logits;  // [rows, vocab]
  i64 stride;
  Row* rows;               // null: the likeliest of each
  const Edit* edits;
  const u32* allowed;      // [masks, mask_words]: a bit a token
  i64* tokens;             // [rows]
  i64* copy;               // null, or [rows]: memory of the host
  float* scratch;          // [blocks, slice + PADDING]: slices of a GPU without clusters
  int count, vocab, mask_words;
};

struct Score {
  const scalar_t* logits;
  i64 stride;
  const int* rows;         // [count]: which of the logits; null: all
  const i64* tokens;       // [rows of logits]: whose log-probability is asked for
  float* chosen;           // [count]
  float* values;           // [count, top]
  i64* ids;                // [count, top]
  float* scratch;
  int count, vocab, top;
};

// A block's part of a row: values of tokens first, first + 1, ...; -inf where that is not a token of this block.
struct Slice {
  float* values;
  int length;       // a multiple of 4
  int first;
  int begin, end;   // its tokens
};

struct Shared {
  u32 low[BINS * COPIES], high[BINS * COPIES];
  u64 bins[2][BINS];   // the block's histogram, which its cluster reads
  u64 board[2];        // the block's part of a reduction
  u64 warps[WARPS];
  u64 below, upto;     // of the digit found
  u32 digit;
  Row row;
};

// Buffers that other blocks read come in pairs: one is rewritten only after the meeting that follows its reading.
struct Exchange {
  Shared& shared;
  int turn = 0;
  __device__ __forceinline__ int next() { return turn ^= 1; }
};

extern __shared__ float4 dynamic[];

// --- keys and weights -----------------------------------------------------------------------------------------

// Order of floats as order of integers; -0 is 0.
__device__ __forceinline__ u32 ordered(float x) {
  const u32 bits = __float_as_uint(x + 0.f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
// Keys for the threshold search: the likelier, the smaller. Of scaled logits, none above 0; of weights, 0 to 1.
__device__ __forceinline__ u32 key_of_logit(float x) { return __float_as_uint(x) << 1; }
__device__ __forceinline__ u32 key_of_weight(float w) { return (0x3f800000u - __float_as_uint(w)) << 2; }

// A weight, 0 to 1, in units of 2^-44, rounded down; 0 of NaN.
__device__ __forceinline__ u64 mass(float weight) {
  if (!(weight > 0.f)) return 0;
  const u32 bits = __float_as_uint(weight);
  const u64 digits = u64(bits & 0x7fffffu | 0x800000u) << (MASS_BITS - 23);
  return digits >> min(127 - int(bits >> 23), 63);
}

// SplitMix64's output function; sampling.py says whose.
__device__ __forceinline__ u64 mix(u64 z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

// --- reductions -----------------------------------------------------------------------------------------------

struct Sum {
  static constexpr u64 NONE = 0;
  static __device__ __forceinline__ u64 of(u64 a, u64 b) { return a + b; }
};
struct Most {
  static constexpr u64 NONE = 0;
  static __device__ __forceinline__ u64 of(u64 a, u64 b) { return a > b ? a : b; }
};
struct Least {
  static constexpr u64 NONE = ~0ull;
  static __device__ __forceinline__ u64 of(u64 a, u64 b) { return a < b ? a : b; }
};

template <class Op>
__device__ __forceinline__ u64 warp_reduce(u64 x) {
#pragma unroll
  for (int step = 16; step; step /= 2) x = Op::of(x, __shfl_xor_sync(~0u, x, step));
  return x;
}
__device__ __forceinline__ u64 warp_inclusive_sum(u64 x) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const u64 left = __shfl_up_sync(~0u, x, step);
    if (lane >= step) x += left;
  }
  return x;
}

// Over the block; `shared.warps` keeps the parts of its warps until the cluster meets again.
template <class Op>
__device__ __forceinline__ u64 block_reduce(u64 x, Shared& shared) {
  x = warp_reduce<Op>(x);
  if (threadIdx.x % 32 == 0) shared.warps[threadIdx.x / 32] = x;
  __syncthreads();
  u64 total = shared.warps[0];
#pragma unroll
  for (int warp = 1; warp < WARPS; ++warp) total = Op::of(total, shared.warps[warp]);
  return total;
}

// Every block's number: lane r has that of block r, and NONE past the last.
template <class Op>
__device__ __forceinline__ u64 exchange(u64 block, Exchange& to) {
  const int lane = threadIdx.x % 32, turn = to.next();
  if (threadIdx.x == 0) to.shared.board[turn] = block;
  cluster_sync();
  return lane < cluster_size() ? load_remote(&to.shared.board[turn], lane) : Op::NONE;
}

// Over the cluster; every thread gets the result.
template <class Op>
__device__ __forceinline__ u64 cluster_reduce(u64 x, Exchange& to) {
  return warp_reduce<Op>(exchange<Op>(block_reduce<Op>(x, to.shared), to));
}

// --- a slice --------------------------------------------------------------------------------------------------

// f(value, token) over the slice's values. Little is unrolled here and below: a launch at batch 1 meets its code cold.
template <class F>
__device__ __forceinline__ void each(const Slice& slice, F f) {
#pragma unroll 2
  for (int i = 4 * threadIdx.x; i < slice.length; i += 4 * THREADS) {
    float x[4];
    load_floats(slice.values + i, x);
#pragma unroll
    for (int e = 0; e < 4; ++e) f(x[e], slice.first + i + e);
  }
}

// Puts f(value, token) in place of each value.
template <class F>
__device__ __forceinline__ void replace(const Slice& slice, F f) {
#pragma unroll 1
  for (int i = 4 * threadIdx.x; i < slice.length; i += 4 * THREADS) {
    float4& x = *reinterpret_cast<float4*>(slice.values + i);
    const int token = slice.first + i;
    x = make_float4(f(x.x, token), f(x.y, token + 1), f(x.z, token + 2), f(x.w, token + 3));
  }
}

// f(VEC values, their place in the slice) over this block's tokens of a row in memory, AHEAD loads of 16 bytes on
// their way at a time; then edge(value, place) over those of the 16 bytes that begin and end outside of it.
template <class F, class Edge>
__device__ __forceinline__ void each_loaded(const scalar_t* row, const Slice& slice, F f, Edge edge) {
  constexpr int AHEAD = 4, STEP = VEC<scalar_t> * THREADS;
  const auto whole = [&](int i) {
    return slice.first + i >= slice.begin && slice.first + i + VEC<scalar_t> <= slice.end;
  };
#pragma unroll 1
  for (int start = VEC<scalar_t> * threadIdx.x; start < slice.length; start += AHEAD * STEP) {
    uint4 raw[AHEAD];
#pragma unroll
    for (int u = 0; u < AHEAD; ++u)
      if (whole(start + u * STEP)) raw[u] = *reinterpret_cast<const uint4*>(row + slice.first + start + u * STEP);
#pragma unroll
    for (int u = 0; u < AHEAD; ++u)
      if (whole(start + u * STEP)) {
        float y[VEC<scalar_t>];
        to_floats(raw[u], y, scalar_t{});
        f(y, start + u * STEP);
      }
  }
  const int n = threadIdx.x % VEC<scalar_t>, last = slice.length - VEC<scalar_t>;
  const int start = threadIdx.x < VEC<scalar_t> ? 0 : last;
  const bool is_edge = threadIdx.x < VEC<scalar_t> ? last >= 0 : threadIdx.x < 2 * VEC<scalar_t> && last > 0;
  if (is_edge && !whole(start)) {
    const int token = slice.first + start + n;
    edge(token >= slice.begin && token < slice.end ? to_float(row[token]) : NEG_INF, start + n);
  }
}

// The block's part of a row. Values begin with the token at the last 16-byte boundary up to its first.
__device__ __forceinline__ Slice slice_of(const scalar_t* row, int vocab, float* scratch) {
  const int size = ceil_div(vocab, int(cluster_size()) * 8) * 8;
  Slice slice;
  slice.begin = min(int(cluster_rank()) * size, vocab), slice.end = min(slice.begin + size, vocab);
  const int shift = int(reinterpret_cast<u64>(row + slice.begin) / sizeof(scalar_t) % VEC<scalar_t>);
  slice.first = slice.begin - shift;
  slice.length = ceil_div(slice.end - slice.first, VEC<scalar_t>) * VEC<scalar_t>;
#if __CUDA_ARCH__ >= 900
  slice.values = reinterpret_cast<float*>(dynamic);
#else
  slice.values = scratch + i64(blockIdx.x) * (size + PADDING);
#endif
  return slice;
}

// The row's logits into the slice.
__device__ __forceinline__ void load(const scalar_t* row, const Slice& slice) {
  const auto put = [&](const float (&y)[VEC<scalar_t>], int i) {
#pragma unroll
    for (int e = 0; e < VEC<scalar_t>; e += 4)
      *reinterpret_cast<float4*>(slice.values + i + e) = make_float4(y[e], y[e + 1], y[e + 2], y[e + 3]);
  };
  each_loaded(row, slice, put, [&](float x, int i) { slice.values[i] = x; });
  __syncthreads();
}

// The likeliest token's key above and ~token below, so that of equals the lowest id wins.
__device__ __forceinline__ u64 candidate(float x, int token) { return u64(ordered(x)) << 32 | u32(~token); }
__device__ __forceinline__ int token_of(u64 candidate) { return int(~u32(candidate)); }

__device__ __forceinline__ u64 likeliest(const Slice& slice, Exchange& to) {
  u64 best = 0;
  each(slice, [&](float x, int token) {
    if (token >= slice.begin && token < slice.end) best = Most::of(best, candidate(x, token));
  });
  return cluster_reduce<Most>(best, to);
}
__device__ __forceinline__ float value_of(u64 candidate) {
  const u32 key = u32(candidate >> 32);
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// --- the threshold search -------------------------------------------------------------------------------------

__device__ __forceinline__ void add(Shared& shared, int bin, u32 one) {
  atomicAdd(&shared.low[bin * COPIES + threadIdx.x % COPIES], one);
}
__device__ __forceinline__ void add(Shared& shared, int bin, u64 mass) {
  if (!mass) return;
  const int at = bin * COPIES + threadIdx.x % COPIES;
  const u32 low = u32(mass), before = atomicAdd(&shared.low[at], low);
  const u32 high = u32(mass >> 32) + (before + low < before);
  if (high) atomicAdd(&shared.high[at], high);
}

struct Threshold {
  u32 last;   // key kept
  u64 upto;   // what those up to it weigh
};

// The greatest key such that those below it weigh less than `target` together: the last one that is needed to reach
// it. `weigh` gives u32 1 for a count, or a u64 mass.
template <class Key, class Weigh>
__device__ __forceinline__ Threshold search(const Slice& slice, Exchange& to, u64 target, Key key_of, Weigh weigh) {
  Shared& shared = to.shared;
  u32 prefix = 0;
  u64 below = 0;
  for (int shift = 32 - DIGIT;; shift -= DIGIT) {
#pragma unroll 1
    for (int i = threadIdx.x; i < BINS * COPIES; i += THREADS) shared.low[i] = shared.high[i] = 0;
    __syncthreads();
    each(slice, [&](float x, int) {
      const u64 key = key_of(x);
      if (key >> (shift + DIGIT) == prefix) add(shared, u32(key >> shift) % BINS, weigh(x));
    });
    __syncthreads();
    const int turn = to.next(), bin = threadIdx.x;
    if (bin < BINS) {
      u64 sum = 0;
#pragma unroll
      for (int copy = 0; copy < COPIES; ++copy)
        sum += (u64(shared.high[bin * COPIES + copy]) << 32) + shared.low[bin * COPIES + copy];
      shared.bins[turn][bin] = sum;
    }
    cluster_sync();
    u64 weight = 0;
    if (bin < BINS)
      for (u32 rank = 0; rank < cluster_size(); ++rank) weight += load_remote(&shared.bins[turn][bin], rank);
    u64 before = warp_inclusive_sum(weight);
    if (threadIdx.x % 32 == 31) shared.warps[threadIdx.x / 32] = before;
    __syncthreads();
    before += below - weight;
#pragma unroll 1
    for (int warp = 0; warp < threadIdx.x / 32; ++warp) before += shared.warps[warp];
    if (bin < BINS && before < target && (before + weight >= target || bin == BINS - 1))
      shared.digit = bin, shared.below = before, shared.upto = before + weight;
    __syncthreads();
    prefix = prefix << DIGIT | shared.digit, below = shared.below;
    const u64 upto = shared.upto;
    if (shift == 0 || upto == target)  // the digits that are left do not matter where the whole bin is needed
      return {u32(((u64(prefix) + 1) << shift) - 1), upto};
  }
}

// Turns scaled logits into weights, 0 where a filter leaves a token out: the k likeliest stay, and of those none under
// min_p of the first. Returns the greatest key of a weight that top_p lets through: the fewest that reach it of the
// k's mass. What ties with the last one kept is kept.
__device__ __forceinline__ u32 filter(const Row& row, const Slice& slice, Exchange& to, int vocab) {
  Threshold kth = {ANYTHING, u64(row.top_k)};
  if (row.top_k < vocab) kth = search(slice, to, u64(row.top_k), key_of_logit, [](float) { return 1u; });
  const u32 lowest = key_of_logit(row.log_min_p);
  u64 sum = 0;
  replace(slice, [&](float x, int) {
    const u32 key = key_of_logit(x);
    if (key > kth.last) return 0.f;
    const float weight = expf(x);
    sum += mass(weight);
    return key <= lowest ? weight : 0.f;
  });
  __syncthreads();
  if (row.top_p == 1.f) return ANYTHING;
  const u64 surplus = kth.upto - u64(row.top_k);  // of those that tie at the k-th, as many do not count
  sum = cluster_reduce<Sum>(sum, to) - surplus * mass(expf(-__uint_as_float(kth.last >> 1)));
  const u64 enough = max(u64(ceil(double(row.top_p) * double(sum))), u64(1));
  return search(slice, to, enough, key_of_weight, mass).last;
}

// --- one row --------------------------------------------------------------------------------------------------

__device__ __forceinline__ float penalised(float x, int seen, const Row& row) {
  const float times = float(seen >> 1);
  x = x > 0.f ? x / row.repetition : x * row.repetition;
  return x - __fmul_rn(row.frequency, times) - (times > 0.f ? row.presence : 0.f);
}

// Fill the slice with the row's logits, its penalties, biases and what may not come taken in.
__device__ __forceinline__ void stage(const Sample& p, const Row& row, const scalar_t* logits, const Slice& slice) {
  load(logits, slice);
  const auto here = [&](int token) { return token >= slice.begin && token < slice.end; };
  if (row.counts)
    replace(slice, [&](float x, int token) {
      const int seen = here(token) ? row.counts[token] : 0;
      return seen ? penalised(x, seen, row) : x;
    });
  if (row.mask >= 0) {
    const u32* allowed = p.allowed + i64(row.mask) * p.mask_words;
    replace(slice, [&](float x, int token) {
      return here(token) && allowed[token / 32] >> token % 32 & 1 ? x : NEG_INF;
    });
  }
  __syncthreads();
  const auto edit = [&](int first, int count, auto f) {
#pragma unroll 1
    for (int i = threadIdx.x; i < count; i += THREADS) {
      const Edit edit = p.edits[first + i];
      if (edit.token < slice.begin || edit.token >= slice.end) continue;
      float& value = slice.values[edit.token - slice.first];
      value = f(value, edit.bias);
    }
    __syncthreads();
  };
  edit(row.edits, row.biases, [](float value, float bias) { return value + bias; });
  const int forbidden = row.position < row.min_tokens ? row.forbidden : 0;
  edit(row.edits + row.biases, forbidden, [](float, float) { return NEG_INF; });
}

// The token in whose stretch of the mass of weights up to key `limit` the row's number falls: by the one thread that
// finds it, -1 by the others. `fallback` where nothing has mass.
__device__ __forceinline__ int draw(const Row& row, const Slice& slice, Exchange& to, u32 limit, int fallback) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int stretch = ceil_div(slice.length, WARPS * 128) * 128;
  const int first = warp * stretch, end = min(first + stretch, slice.length);
  const auto kept = [&](float weight) { return key_of_weight(weight) <= limit ? mass(weight) : 0; };

  u64 sum = 0;
  for (int i = first + 4 * lane; i < end; i += 128) {
    const float4 w = *reinterpret_cast<const float4*>(slice.values + i);
    sum += kept(w.x) + kept(w.y) + kept(w.z) + kept(w.w);
  }
  const u64 block = block_reduce<Sum>(sum, to.shared);
  const u64 blocks = warp_inclusive_sum(exchange<Sum>(block, to));
  const u64 total = __shfl_sync(~0u, blocks, 31);
  u64 before = __shfl_sync(~0u, blocks, cluster_rank()) - block;
  if (total == 0) return cluster_rank() == 0 && threadIdx.x == 0 ? fallback : -1;

  const u64 bits = mix(row.stream + (u64(row.position) + 1) * 0x9E3779B97F4A7C15ull);
  const u64 wanted = __umul64hi(bits & ~u64(0xfff), total);  // the row's number in [0, 1) x total, rounded down
#pragma unroll 1
  for (int w = 0; w < warp; ++w) before += to.shared.warps[w];
  if (wanted < before || wanted >= before + to.shared.warps[warp]) return -1;

  for (int i = first + 4 * lane;; i += 128) {
    float weights[4];
    u64 masses[4], mine = 0;
    if (i < end) load_floats(slice.values + i, weights);
#pragma unroll
    for (int e = 0; e < 4; ++e) mine += masses[e] = i < end ? kept(weights[e]) : 0;
    const u64 upto = before + warp_inclusive_sum(mine);
    if (__any_sync(~0u, wanted < upto)) {
      const bool here = wanted >= upto - mine && wanted < upto;
      u64 running = upto - mine;
      int token = slice.first + i;
#pragma unroll
      for (int e = 0; e < 3; ++e) token += wanted >= (running += masses[e]);
      return here ? token : -1;
    }
    before = __shfl_sync(~0u, upto, 31);
  }
}

// The row's token, by the one thread that finds it; -1 by the others.
__device__ __forceinline__ int sample_row(const Sample& p, const Row& row, const scalar_t* logits, Exchange& to) {
  const Slice slice = slice_of(logits, p.vocab, p.scratch);
  stage(p, row, logits, slice);
  const u64 best = likeliest(slice, to);
  if (row.temperature == 0.f) return cluster_rank() == 0 && threadIdx.x == 0 ? token_of(best) : -1;

  const float highest = value_of(best);
  replace(slice, [&](float x, int) { return (x - highest) / row.temperature; });
  return draw(row, slice, to, filter(row, slice, to, p.vocab), token_of(best));
}

// The likeliest token of a row as it is, by one thread; -1 by the others.
__device__ __forceinline__ int argmax_row(const Sample& p, const scalar_t* logits, Exchange& to) {
  const Slice slice = slice_of(logits, p.vocab, p.scratch);
  u64 best = 0;
  const auto meet = [&](float x, int i) {
    const int token = slice.first + i;
    if (token >= slice.begin && token < slice.end) best = Most::of(best, candidate(x, token));
  };
  const auto meet_all = [&](const float (&y)[VEC<scalar_t>], int i) {
#pragma unroll
    for (int e = 0; e < VEC<scalar_t>; ++e) best = Most::of(best, candidate(y[e], slice.first + i + e));
  };
  each_loaded(logits, slice, meet_all, meet);
  best = cluster_reduce<Most>(best, to);
  return cluster_rank() == 0 && threadIdx.x == 0 ? token_of(best) : -1;
}

// grid: clusters, which take rows in turn
extern "C" __global__ void __launch_bounds__(THREADS, 2) sample(const __grid_constant__ Sample p) {
  __shared__ Shared shared;
  Exchange to{shared};
  grid_dependency_wait();
  grid_launch_dependents();
  const int clusters = gridDim.x / cluster_size();
  for (int r = blockIdx.x / cluster_size(); r < p.count; r += clusters) {
    const scalar_t* logits = p.logits + r * p.stride;
    const Row& row = shared.row;
    bool plain = true;
    if (p.rows) {
      if (threadIdx.x < sizeof(Row) / 4)
        reinterpret_cast<u32*>(&shared.row)[threadIdx.x] = reinterpret_cast<const u32*>(p.rows + r)[threadIdx.x];
      __syncthreads();
      plain = row.temperature == 0.f && !row.counts && row.mask < 0 && !row.biases && row.position >= row.min_tokens;
    }
    const int token = plain ? argmax_row(p, logits, to) : sample_row(p, row, logits, to);
    if (token >= 0) {  // all blocks have met since they read the row
      p.tokens[r] = token;
      if (p.copy) p.copy[r] = token;
      if (p.rows) p.rows[r].position = row.position + 1;
      if (p.rows && row.counts) row.counts[token] += 2;
    }
    cluster_sync();  // what they show each other has been read
  }
}

// Natural log-probabilities of a token and of the likeliest. grid: clusters, which take rows in turn
extern "C" __global__ void __launch_bounds__(THREADS, 2) score(const __grid_constant__ Score p) {
  __shared__ Shared shared;
  Exchange to{shared};
  grid_dependency_wait();
  grid_launch_dependents();
  const int clusters = gridDim.x / cluster_size();
  for (int r = blockIdx.x / cluster_size(); r < p.count; r += clusters) {
    const int at = p.rows ? p.rows[r] : r;
    const scalar_t* logits = p.logits + at * p.stride;
    const Slice slice = slice_of(logits, p.vocab, p.scratch);
    load(logits, slice);
    const float highest = value_of(likeliest(slice, to));
    u64 sum = 0;
    replace(slice, [&](float x, int) {
      sum += mass(expf(x - highest));
      return x - highest;
    });
    sum = cluster_reduce<Sum>(sum, to);
    const float log_sum = logf(float(double(sum) * (1.0 / double(1ull << MASS_BITS))));
    const int chosen = int(p.tokens[at]);
    if (threadIdx.x == 0 && chosen >= slice.begin && chosen < slice.end)
      p.chosen[r] = slice.values[chosen - slice.first] - log_sum;
    // one after the other: the least (key, token) above the last
    u64 last = 0;
    for (int n = 0; n < p.top; ++n) {
      u64 least = Least::NONE;
      each(slice, [&](float x, int token) {
        const u64 found = u64(key_of_logit(x)) << 32 | u32(token);
        if (token >= slice.begin && token < slice.end && (n == 0 || found > last)) least = Least::of(least, found);
      });
      last = cluster_reduce<Least>(least, to);
      if (cluster_rank() == 0 && threadIdx.x == 0) {
        p.values[i64(r) * p.top + n] = -__uint_as_float(u32(last >> 32) >> 1) - log_sum;
        p.ids[i64(r) * p.top + n] = int(u32(last));
      }
    }
    cluster_sync();
  }
}
