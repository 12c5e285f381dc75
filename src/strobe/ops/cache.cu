// New keys and values into their pages, queries and keys normed and rotated on the way, in one launch.
//
// Defines: scalar_t, kv_t (of the cache: scalar_t, or u8 for e4m3), HEAD_DIM, ROTATE, NORM (RMSNorm of each query's
// and key's head first), EARLY (slots, cos and sin were complete before the kernel just ahead started), TAKEN (heads of
// a token that a thread takes: they share its slot and its angles).
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

__device__ __forceinline__ uint4 load_vector(const scalar_t* from) { return *reinterpret_cast<const uint4*>(from); }

// cos and sin that features d .. d + 7 of a half are turned by: the same in both halves but for sin's sign.
__device__ __forceinline__ void load_turn(const Append& p, i64 token, int d, uint4 (&turn)[2]) {
  const i64 from = token * HEAD_DIM + HEAD_DIM / 2 + d;
  turn[0] = load_vector(p.cos + from), turn[1] = load_vector(p.sin + from);
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

// Norm, turn and store what a thread holds of a head: features d .. d + 7 of either half.
__device__ __forceinline__ void finish(const Append& p, i64 token, i64 slot, int head, int d, const uint4 (&x)[2],
                                       const uint4 (&turn)[2]) {
  constexpr int HALF = HEAD_DIM / 2;
  const int value = head - p.q_heads - p.kv_heads;  // from 0 on: a value's head
  float first[8], second[8];
  to_floats(x[0], first, scalar_t{});
  to_floats(x[1], second, scalar_t{});
  if (NORM && value < 0) {
    const scalar_t* const weights = (head < p.q_heads ? p.q_norm : p.k_norm) + d;
    float gains[2][8];
    load_floats(weights, gains[0]);
    load_floats(weights + HALF, gains[1]);
    const float factor = inverse_rms(first, second, p.norm_eps);
#pragma unroll
    for (int i = 0; i < 8; ++i) first[i] *= factor * gains[0][i], second[i] *= factor * gains[1][i];
  }
  if (ROTATE && value < 0) {
    float cos[8], sin[8];
    to_floats(turn[0], cos, scalar_t{});
    to_floats(turn[1], sin, scalar_t{});
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
  kv_t* to = (value < 0 ? p.k_pages : p.v_pages) + (slot * p.kv_heads + kv_head) * HEAD_DIM;
  const float* scales = value < 0 ? p.k_scale : p.v_scale;
  store(to + d, first, scales, kv_head);
  store(to + HALF + d, second, scales, kv_head);
}

// A thread takes eight features of a head's first half and the eight that rope pairs them with in its second, of TAKEN
// heads that are `apart` from one another. All loads are under way before the first is used.
// grid (tokens, blocks of a token's apart x HEAD_DIM / 16 threads)
extern "C" __global__ void append(const __grid_constant__ Append p) {
  constexpr int HALF = HEAD_DIM / 2, PIECES = HALF / 8;
  const int heads = p.q_heads + 2 * p.kv_heads, apart = (heads + TAKEN - 1) / TAKEN;
  const u32 at = blockIdx.y * blockDim.x + threadIdx.x;
  const int first_head = at / PIECES, d = at % PIECES * 8;
  const i64 token = blockIdx.x;
  const scalar_t* from[TAKEN];
#pragma unroll
  for (int i = 0; i < TAKEN; ++i) {
    const int head = first_head + i * apart, value = head - p.q_heads - p.kv_heads;
    from[i] = (value < 0 ? p.k : p.v) + token * (value < 0 ? p.k_token : p.v_token) +
              (value < 0 ? head : value) * (value < 0 ? p.k_head : p.v_head);
  }
  i64 slot;
  uint4 turn[2];
  if (EARLY) {
    slot = p.slots[token];
    if (ROTATE) load_turn(p, token, d, turn);
  }
  grid_dependency_wait();
  grid_launch_dependents();
  if (first_head >= apart) return;

  uint4 x[TAKEN][2];
#pragma unroll
  for (int i = 0; i < TAKEN; ++i)
    if (first_head + i * apart < heads) x[i][0] = load_vector(from[i] + d), x[i][1] = load_vector(from[i] + HALF + d);
  if (!EARLY) {
    slot = p.slots[token];
    if (ROTATE) load_turn(p, token, d, turn);
  }
#pragma unroll
  for (int i = 0; i < TAKEN; ++i) {
    const int head = first_head + i * apart;
    if (head < heads) finish(p, token, slot, head, d, x[i], turn);
  }
}
