// CUDA C++'s own names for g++: included ahead of every kernel.
#pragma once

#include <bit>
#include <cmath>
#include <concepts>
#include <type_traits>

#include "runtime.h"

using emulator::Where;

#define __CUDA_ARCH__ 900
#define __device__
#define __host__
#define __global__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define alignas(bytes) __attribute__((aligned(bytes)))
#define __shared__ static __attribute__((section("shared_memory")))

// --- vectors -----------------------------------------------------------------------------------------

struct __align__(8) float2 { float x, y; };
struct __align__(16) float4 { float x, y, z, w; };
struct __align__(8) int2 { int x, y; };
struct __align__(16) int4 { int x, y, z, w; };
struct __align__(8) uint2 { unsigned x, y; };
struct uint3 { unsigned x, y, z; };
struct __align__(16) uint4 { unsigned x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// --- arithmetic --------------------------------------------------------------------------------------

inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __logf(float x) { return logf(x); }
inline float __expf(float x) { return expf(x); }
float __fmul_rn(float a, float b);  // elsewhere a product and a sum become one fma, as in CUDA
float __fadd_rn(float a, float b);
inline float __frcp_rn(float x) { return 1.f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
inline float __saturatef(float x) { return fminf(fmaxf(x, 0.f), 1.f); }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(unsigned(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned long long)(a) * b >> 32; }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned __int128>(a) * b >> 64;
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const unsigned long long bytes = (unsigned long long)(b) << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= unsigned(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return result;
}

template <std::integral A, std::integral B>
constexpr auto min(A a, B b) {
  using Both = std::common_type_t<A, B>;
  return Both(a) < Both(b) ? Both(a) : Both(b);
}
template <std::integral A, std::integral B>
constexpr auto max(A a, B b) {
  using Both = std::common_type_t<A, B>;
  return Both(a) > Both(b) ? Both(a) : Both(b);
}
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }

// --- memory ------------------------------------------------------------------------------------------

template <class T>
T __ldg(const T* p) {
  return *p;
}
inline size_t __cvta_generic_to_shared(const void* p) { return emulator::shared_address(p); }

inline void __threadfence() {}
inline void __threadfence_block() {}

// Threads of this emulation never run at the same moment: read, change, write.
#define EMULATOR_ATOMIC(NAME, EXPRESSION)                                                                        \
  template <class T>                                                                                             \
  __attribute__((no_sanitize("thread"))) T NAME(T* p, std::type_identity_t<T> x, Where where = Where::current()) { \
    emulator::look_at(p, sizeof(T), where);                                                                      \
    const T old = *p;                                                                                            \
    *p = EXPRESSION;                                                                                             \
    return old;                                                                                                  \
  }
EMULATOR_ATOMIC(atomicAdd, old + x)
EMULATOR_ATOMIC(atomicSub, old - x)
EMULATOR_ATOMIC(atomicExch, x)
EMULATOR_ATOMIC(atomicMin, old < x ? old : x)
EMULATOR_ATOMIC(atomicMax, old > x ? old : x)
EMULATOR_ATOMIC(atomicInc, old >= x ? 0 : old + 1)
EMULATOR_ATOMIC(atomicDec, old == 0 || old > x ? x : old - 1)
EMULATOR_ATOMIC(atomicAnd, old & x)
EMULATOR_ATOMIC(atomicOr, old | x)
EMULATOR_ATOMIC(atomicXor, old ^ x)
template <class T>
__attribute__((no_sanitize("thread"))) T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> x,
                                                   Where where = Where::current()) {
  emulator::look_at(p, sizeof(T), where);
  const T old = *p;
  if (old == expected) *p = x;
  return old;
}

// --- meeting -----------------------------------------------------------------------------------------

inline void __syncthreads(Where where = Where::current()) { emulator::meet_block(0, 0, true, where); }
inline void __syncwarp(unsigned mask = ~0u, Where where = Where::current()) {
  emulator::meet_warp(mask, nullptr, [](void* const*) {}, true, where);
}

namespace emulator {

// A lane's part in a shuffle: what it gives, the lane it reads (its own where that does not exist), what it gets.
template <class T>
struct Shuffle {
  T value;
  int from;
};

template <class T>
T shuffle(unsigned mask, T value, int from, Where where) {
  Shuffle<T> mine{value, from};
  meet_warp(mask, &mine, [](void* const* lanes) __attribute__((no_sanitize("thread"))) {
    T values[32] = {};
    for (int i = 0; i < 32; ++i)
      if (lanes[i]) values[i] = static_cast<Shuffle<T>*>(lanes[i])->value;
    for (int i = 0; i < 32; ++i)
      if (lanes[i]) static_cast<Shuffle<T>*>(lanes[i])->value = values[static_cast<Shuffle<T>*>(lanes[i])->from];
  }, false, where);
  return mine.value;
}

inline int lane() { return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32; }

inline unsigned ballot(unsigned mask, bool vote, Where where) {
  unsigned mine = vote;
  meet_warp(mask, &mine, [](void* const* lanes) __attribute__((no_sanitize("thread"))) {
    unsigned votes = 0;
    for (int i = 0; i < 32; ++i)
      if (lanes[i]) votes |= *static_cast<unsigned*>(lanes[i]) << i;
    for (int i = 0; i < 32; ++i)
      if (lanes[i]) *static_cast<unsigned*>(lanes[i]) = votes;
  }, false, where);
  return mine;
}

}  // namespace emulator

template <class T>
T __shfl_sync(unsigned mask, T x, int from, int width = 32, Where where = Where::current()) {
  return emulator::shuffle(mask, x, emulator::lane() / width * width + from % width, where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int bits, int width = 32, Where where = Where::current()) {
  const int me = emulator::lane(), from = me ^ bits;
  return emulator::shuffle(mask, x, from / width <= me / width ? from : me, where);
}
template <class T>
T __shfl_up_sync(unsigned mask, T x, int step, int width = 32, Where where = Where::current()) {
  const int me = emulator::lane();
  return emulator::shuffle(mask, x, me % width >= step ? me - step : me, where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T x, int step, int width = 32, Where where = Where::current()) {
  const int me = emulator::lane();
  return emulator::shuffle(mask, x, me % width + step < width ? me + step : me, where);
}
inline unsigned __ballot_sync(unsigned mask, bool vote, Where where = Where::current()) {
  return emulator::ballot(mask, vote, where);
}
inline bool __any_sync(unsigned mask, bool vote, Where where = Where::current()) {
  return emulator::ballot(mask, vote, where) != 0;
}
inline bool __all_sync(unsigned mask, bool vote, Where where = Where::current()) {
  return emulator::ballot(mask, !vote, where) == 0;
}

// What the build appends for each kernel of a source.
#define EMULATOR_KERNEL(name)                                                                        \
  extern "C" __attribute__((visibility("default"))) const emulator::Kernel emulated_##name = {       \
      #name, emulator::Entry<&name>::call, emulator::Entry<&name>::SIZES, emulator::Entry<&name>::PARAMETERS};
