// New keys and values into their pages, queries and keys normed and rotated on the way, in one launch.
//
// Defines: scalar_t, kv_t (of the cache: scalar_t, or u8 for e4m3), HEAD_DIM, ROTATE, NORM (RMSNorm of each query's
// and key's head first), EARLY (slots, cos and sin were complete before the kernel just ahead started).
#include "grid_dependency.cuh"
#include "types.cuh"

struct Append {
  const scalar_t *k, *v;  // k [tokens, q_heads + kv_heads, HEAD_DIM]: the queries' heads first, where ROTATE
  scalar_t* q;            // [tokens, q_heads, HEAD_DIM], contiguous: the queries rotated
  kv_t *k_pages, *v_pages;  // [slots, kv_heads, HEAD_DIM], contiguous
  const scalar_t *cos, *sin;  // [tokens, HEAD_DIM], sin negated in its first half
  const i64* slots;           // [tokens]
  const float *k_scale, *v_scale;  // [kv_heads], or null
  i64 k_token, k_head, v_token, v_head;  // strides
  int tokens, q_heads, kv_heads;
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

// What features d .. d + 7 of a half are turned by: the same in both halves but for sin's sign.
__device__ __forceinline__ void load_turn(const Append& p, i64 token, int d, float (&cos)[8], float (&sin)[8]) {
  load_floats(p.cos + token * HEAD_DIM + HEAD_DIM / 2 + d, cos);
  load_floats(p.sin + token * HEAD_DIM + HEAD_DIM / 2 + d, sin);
}

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

// A thread takes eight features of a head's first half and the eight that rope pairs them with in its second.
// grid: tokens x (q_heads + 2 kv_heads) x HEAD_DIM / 16 threads
extern "C" __global__ void append(const __grid_constant__ Append p) {
  constexpr int HALF = HEAD_DIM / 2, PIECES = HALF / 8;
  const u32 at = blockIdx.x * blockDim.x + threadIdx.x;  // 2^32 threads would have 128 GiB of q, k and v
  const int heads = p.q_heads + 2 * p.kv_heads, head = at / PIECES % u32(heads), d = at % PIECES * 8;
  const i64 token = at / PIECES / u32(heads);
  i64 slot;
  float cos[8], sin[8];
  if (EARLY && token < p.tokens) {
    slot = p.slots[token];
    if (ROTATE) load_turn(p, token, d, cos, sin);
  }
  grid_dependency_wait();
  grid_launch_dependents();
  if (token >= p.tokens) return;

  const int value = head - p.q_heads - p.kv_heads;  // from 0 on: a value's head
  const scalar_t* from =
      value < 0 ? p.k + token * p.k_token + head * p.k_head : p.v + token * p.v_token + value * p.v_head;
  uint4 norm[2];
  if (NORM && value < 0) {
    const scalar_t* const gains = (head < p.q_heads ? p.q_norm : p.k_norm) + d;
    norm[0] = *reinterpret_cast<const uint4*>(gains), norm[1] = *reinterpret_cast<const uint4*>(gains + HALF);
  }
  float first[8], second[8];
  load_floats(from + d, first);
  load_floats(from + HALF + d, second);
  if (NORM && value < 0) {
    const float factor = inverse_rms(first, second, p.norm_eps);
    float gains[2][8];
    to_floats(norm[0], gains[0], scalar_t{});
    to_floats(norm[1], gains[1], scalar_t{});
#pragma unroll
    for (int i = 0; i < 8; ++i) first[i] *= factor * gains[0][i], second[i] *= factor * gains[1][i];
  }
  if (ROTATE && value < 0) {
    if (!EARLY) load_turn(p, token, d, cos, sin);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float x = first[i], y = second[i];
      first[i] = x * cos[i] - y * sin[i];
      second[i] = y * cos[i] + x * sin[i];
    }
  }
  if (head < p.q_heads) {
    scalar_t* to = p.q + (token * p.q_heads + head) * HEAD_DIM;
    store(to + d, first, nullptr, 0);
    store(to + HALF + d, second, nullptr, 0);
    return;
  }
  const int kv_head = value < 0 ? head - p.q_heads : value;
  kv_t* to = (value < 0 ? p.k_pages : p.v_pages) + ((EARLY ? slot : p.slots[token]) * p.kv_heads + kv_head) * HEAD_DIM;
  const float* scales = value < 0 ? p.k_scale : p.v_scale;
  store(to + d, first, scales, kv_head);
  store(to + HALF + d, second, scales, kv_head);
}
