// New keys and values into their pages, queries and keys rotated on the way, in one launch.
//
// Defines: scalar_t, kv_t (of the cache: scalar_t, or u8 for e4m3), HEAD_DIM, ROTATE.
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

// A thread takes eight features of a head's first half and the eight that rope pairs them with in its second.
// grid: tokens x (q_heads + 2 kv_heads) x HEAD_DIM / 16 threads
extern "C" __global__ void append(const __grid_constant__ Append p) {
  constexpr int HALF = HEAD_DIM / 2, PIECES = HALF / 8;
  const i64 at = i64(blockIdx.x) * blockDim.x + threadIdx.x;
  const int heads = p.q_heads + 2 * p.kv_heads, head = at / PIECES % heads, d = at % PIECES * 8;
  const i64 token = at / PIECES / heads;
  grid_dependency_wait();
  grid_launch_dependents();
  if (token >= p.tokens) return;

  const int value = head - p.q_heads - p.kv_heads;  // from 0 on: a value's head
  const scalar_t* from =
      value < 0 ? p.k + token * p.k_token + head * p.k_head : p.v + token * p.v_token + value * p.v_head;
  float first[8], second[8];
  load_floats(from + d, first);
  load_floats(from + HALF + d, second);
  if (ROTATE && value < 0) {
    float cos[8], sin[8];
    load_floats(p.cos + token * HEAD_DIM + HALF + d, cos);  // each the same in both halves but for sin's sign
    load_floats(p.sin + token * HEAD_DIM + HALF + d, sin);
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
  kv_t* to = (value < 0 ? p.k_pages : p.v_pages) + (p.slots[token] * p.kv_heads + kv_head) * HEAD_DIM;
  const float* scales = value < 0 ? p.k_scale : p.v_scale;
  store(to + d, first, scales, kv_head);
  store(to + HALF + d, second, scales, kv_head);
}
