// New keys and values into their pages, queries and keys normed and rotated on the way, in one launch.
//
// Defines: scalar_t, kv_t (of the cache: scalar_t, or u8 for e4m3), HEAD_DIM, ROTATE, NORM (RMSNorm of each query's
// and key's head first), EARLY (slots, cos and sin were complete before the kernel just ahead started).
#include "grid_dependency.cuh"
#include "memory.cuh"
#include "types.cuh"

struct Append {
  const scalar_t *k, *v;  // k [tokens, q_heads + kv_heads, HEAD_DIM]: the queries' heads first, where ROTATE
  scalar_t* q;            // [tokens, q_heads, HEAD_DIM], contiguous: the queries rotated
  kv_t *k_pages, *v_pages;  // [slots, kv_heads, HEAD_DIM], contiguous
  const scalar_t *cos, *sin;  // [tokens, HEAD_DIM], sin negated in its first half
  const i64* slots;           // [tokens]
  const float *k_scale, *v_scale;  // [kv_heads], or null
  i64 k_token, k_head, v_token, v_head;  // strides
  int q_heads, kv_heads;
  float norm_eps;
  const scalar_t *q_norm, *k_norm;  // [HEAD_DIM]
};

// Eight features to the cache, divided by the head's scale where it is e4m3 (the largest finite number at most).
__device__ __forceinline__ void store(scalar_t* to, const float (&x)[8], const float*, int) {
  *reinterpret_cast<uint4*>(to) =
      make_uint4(pack<scalar_t>(x[0], x[1]), pack<scalar_t>(x[2], x[3]), pack<scalar_t>(x[4], x[5]),
                 pack<scalar_t>(x[6], x[7]));
}
__device__ __forceinline__ void store(u8* to, const float (&x)[8], const float* scales, int head) {
  const float scale = scales ? 1.f / scales[head] : 1.f;
  u16 pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float high = x[2 * i + 1] * scale, low = x[2 * i] * scale;
    pairs[i] = e4m3_pair(low, high);
  }
  *reinterpret_cast<uint2*>(to) = make_uint2(pairs[0] | u32(pairs[1]) << 16, pairs[2] | u32(pairs[3]) << 16);
}

// The same of features as they came.
__device__ __forceinline__ void store(scalar_t* to, uint4 x, const float*, int) { *reinterpret_cast<uint4*>(to) = x; }
__device__ __forceinline__ void store(u8* to, uint4 x, const float* scales, int head) {
  float wide[8];
  to_floats(x, wide, scalar_t{});
  store(to, wide, scales, head);
}

__device__ __forceinline__ uint4 load_vector(const scalar_t* from) { return *reinterpret_cast<const uint4*>(from); }

// 1 / rms of the head that a thread holds 16 features of. Its neighbours hold the rest, and no others' threads.
__device__ __forceinline__ float inverse_rms(const float (&first)[8], const float (&second)[8], float eps) {
  constexpr int PIECES = HEAD_DIM / 16;
  static_assert(!NORM || 32 % PIECES == 0, "a head's threads are in one warp");
  const u32 group = u32((1ull << PIECES) - 1) << threadIdx.x % 32 / PIECES * PIECES;
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < 8; ++i) sum += first[i] * first[i] + second[i] * second[i];
#pragma unroll
  for (int step = PIECES / 2; step; step /= 2) sum += __shfl_xor_sync(group, sum, step);
  return rsqrtf(sum / HEAD_DIM + eps);
}

// Where a head's row is written: queries in the order of the tokens, keys and values by slots.
__device__ __forceinline__ void* destination(const Append& p, u32 token, i64 slot, int head) {
  if (head < p.q_heads) return p.q + (i64(token) * p.q_heads + head) * HEAD_DIM;
  const int kv_head = head - p.q_heads;
  if (kv_head < p.kv_heads) return p.k_pages + (slot * p.kv_heads + kv_head) * HEAD_DIM;
  return p.v_pages + (slot * p.kv_heads + kv_head - p.kv_heads) * HEAD_DIM;
}

// A thread takes eight features of a head's first half and the eight that rope pairs them with in its second. (Two
// heads a thread and addresses computed behind the wait: 256 tokens of 96 heads took an H200 4.6 us instead of 3.9.)
// grid (tokens, blocks of a token's heads x HEAD_DIM / 16 threads)
extern "C" __global__ void append(const __grid_constant__ Append p) {
  constexpr int HALF = HEAD_DIM / 2, PIECES = HALF / 8;
  const u32 at = blockIdx.y * blockDim.x + threadIdx.x, token = blockIdx.x;
  const int head = at / PIECES, d = at % PIECES * 8;
  const int value = head - p.q_heads - p.kv_heads;  // from 0 on: a value's head
  const scalar_t* const from = computed_here(
      d + (value < 0 ? p.k + token * p.k_token + head * p.k_head : p.v + token * p.v_token + value * p.v_head));
  i64 slot;
  uint4 angles[2];  // cos and sin: the same in both halves but for sin's sign
  auto ask = [&] {
    slot = p.slots[token];
    if (!ROTATE) return;
    const i64 row = i64(token) * HEAD_DIM + HALF + d;
    angles[0] = load_vector(p.cos + row), angles[1] = load_vector(p.sin + row);
  };
  void* to;
  if (EARLY) {
    ask();
    to = computed_here(destination(p, token, slot, head));
  }
  grid_dependency_wait();
  grid_launch_dependents();
  if (value >= p.kv_heads) return;

  const uint4 x[2] = {load_vector(from), load_vector(from + HALF)};
  uint4 gains[2];
  if (NORM && value < 0) {
    const scalar_t* const weights = (head < p.q_heads ? p.q_norm : p.k_norm) + d;
    gains[0] = load_vector(weights), gains[1] = load_vector(weights + HALF);
  }
  if (!EARLY) {
    ask();
    to = destination(p, token, slot, head);
  }
  if (value >= 0) {
    kv_t* const row = static_cast<kv_t*>(to) + d;
    store(row, x[0], p.v_scale, value);
    store(row + HALF, x[1], p.v_scale, value);
    return;
  }
  float first[8], second[8];
  to_floats(x[0], first, scalar_t{});
  to_floats(x[1], second, scalar_t{});
  if (NORM) {
    float scale[2][8];
    to_floats(gains[0], scale[0], scalar_t{});
    to_floats(gains[1], scale[1], scalar_t{});
    const float factor = inverse_rms(first, second, p.norm_eps);
#pragma unroll
    for (int i = 0; i < 8; ++i) first[i] *= factor * scale[0][i], second[i] *= factor * scale[1][i];
  }
  if (ROTATE) {
    float cos[8], sin[8];
    to_floats(angles[0], cos, scalar_t{});
    to_floats(angles[1], sin, scalar_t{});
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float low = first[i], high = second[i];
      first[i] = low * cos[i] - high * sin[i];
      second[i] = high * cos[i] + low * sin[i];
    }
  }
  if (head < p.q_heads) {
    scalar_t* const row = static_cast<scalar_t*>(to) + d;
    store(row, first, nullptr, 0);
    store(row + HALF, second, nullptr, 0);
  } else {
    kv_t* const row = static_cast<kv_t*>(to) + d;
    store(row, first, p.k_scale, head - p.q_heads);
    store(row + HALF, second, p.k_scale, head - p.q_heads);
  }
}
