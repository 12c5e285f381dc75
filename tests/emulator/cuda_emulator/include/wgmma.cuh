// The emulator's wgmma.cuh: a product is done when its group is waited for, no earlier.
#pragma once

#include "matrix_descriptor.cuh"
#include "mma.cuh"

inline void wgmma_fence() {}
inline void wgmma_commit(Where where = Where::current()) { emulator::wgmma_commit(where); }
template <int PENDING>
void wgmma_wait(Where where = Where::current()) {
  emulator::wgmma_wait(PENDING, where);
}
template <int N>
void pin(float (&)[N]) {}

template <class T, int N>
struct Wgmma {
  template <bool ACCUMULATE>
  static void ss(float (&d)[N / 2], u64 a, u64 b, Where where = Where::current()) {
    emulator::wgmma({EMULATED<T>, N, ACCUMULATE, false, d, {}, a, b}, where);
  }
  static void rs(float (&d)[N / 2], const u32 (&a)[4], u64 b, Where where = Where::current()) {
    emulator::wgmma({EMULATED<T>, N, true, true, d, {a[0], a[1], a[2], a[3]}, 0, b}, where);
  }
};
