// Numeric types and their conversions, without toolkit headers.
//
// f16 and bf16 are storage: arithmetic is float, or packed pairs in tensor-core registers (mma.cuh).
// `scalar_t` kernels use to_float / from_float and never name a type.
#pragma once

#include "convert.cuh"

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;
using f32 = float;

struct alignas(2) f16 { u16 bits; };
struct alignas(2) bf16 { u16 bits; };

constexpr float LOG2E = 1.4426950408889634f;  // log2(e): exp(x) = exp2(x * LOG2E)
constexpr float LN2 = 0.6931471805599453f;    // ln(2): log(x) = log2(x) * LN2
#define NEG_INF __int_as_float(0xff800000)

// --- float <-> 16 bits, round to nearest even ---------------------------------------------------

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __int_as_float(u32(x.bits) << 16); }
__device__ __forceinline__ float to_float(f16 x) { return f16_value(x.bits); }

template <class T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ f16 from_float<f16>(float x) { return {f16_bits(x)}; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) {
  bf16 y;
  y.bits = bf16_bits(x);
  return y;
}

// --- pairs of 16 bits in one register: `low` is the element at the lower address -------------------

template <class T> __device__ __forceinline__ u32 pack(float low, float high);
template <> __device__ __forceinline__ u32 pack<f16>(float low, float high) { return f16_pair(low, high); }
template <> __device__ __forceinline__ u32 pack<bf16>(float low, float high) { return bf16_pair(low, high); }

template <class T> __device__ __forceinline__ float2 unpack(u32 pair);
template <> __device__ __forceinline__ float2 unpack<f16>(u32 pair) {
  return make_float2(to_float(f16{u16(pair)}), to_float(f16{u16(pair >> 16)}));
}
template <> __device__ __forceinline__ float2 unpack<bf16>(u32 pair) {
  return make_float2(__int_as_float(pair << 16), __int_as_float(pair & 0xffff0000u));
}

template <class T> __device__ __forceinline__ u32 multiply_pairs(u32 a, u32 b);
template <> __device__ __forceinline__ u32 multiply_pairs<f16>(u32 a, u32 b) { return f16_product(a, b); }
template <> __device__ __forceinline__ u32 multiply_pairs<bf16>(u32 a, u32 b) { return bf16_product(a, b); }

// --- 16 bytes at a time: VEC<T> elements, as floats ------------------------------------------------

template <class T> constexpr int VEC = 16 / sizeof(T);

__device__ __forceinline__ void to_floats(uint4 raw, float (&y)[4], float) {
  y[0] = __uint_as_float(raw.x), y[1] = __uint_as_float(raw.y);
  y[2] = __uint_as_float(raw.z), y[3] = __uint_as_float(raw.w);
}
template <class T> __device__ __forceinline__ void to_floats(uint4 raw, float (&y)[8], T) {
  const u32 words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack<T>(words[i]);
    y[2 * i] = pair.x, y[2 * i + 1] = pair.y;
  }
}
// 16 aligned bytes at `p`, widened.
template <class T> __device__ __forceinline__ void load_floats(const T* p, float (&y)[VEC<T>]) {
  to_floats(*reinterpret_cast<const uint4*>(p), y, T{});
}
// To 16 aligned bytes at `p`, rounded.
__device__ __forceinline__ void store_floats(float* p, const float (&x)[4]) {
  *reinterpret_cast<float4*>(p) = make_float4(x[0], x[1], x[2], x[3]);
}
template <class T> __device__ __forceinline__ void store_floats(T* p, const float (&x)[8]) {
  *reinterpret_cast<uint4*>(p) =
      make_uint4(pack<T>(x[0], x[1]), pack<T>(x[2], x[3]), pack<T>(x[4], x[5]), pack<T>(x[6], x[7]));
}

// --- functions ------------------------------------------------------------------------------------

// Absolute error under 1e-6. tanh.approx is one instruction, but 5e-4 off: a softcap of 30 would move
// scores by 0.015.
__device__ __forceinline__ float fast_tanh(float x) {
  return 1.f - __fdividef(2.f, fast_exp2(x * (2.f * LOG2E)) + 1.f);
}

// --- integers -------------------------------------------------------------------------------------

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
__device__ __forceinline__ u32 shared_address(const void* p) { return u32(__cvta_generic_to_shared(p)); }
