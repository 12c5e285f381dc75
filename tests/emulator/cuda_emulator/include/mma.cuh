// The emulator's mma.cuh.
#pragma once

#include "types.cuh"

template <class T>
constexpr emulator::Type EMULATED = emulator::Type::F16;
template <>
constexpr emulator::Type EMULATED<bf16> = emulator::Type::BF16;

inline void load_matrices(u32 (&m)[4], u32 address, Where where = Where::current()) {
  emulator::load_matrices(m, address, false, where);
}
inline void load_matrices_transposed(u32 (&m)[4], u32 address, Where where = Where::current()) {
  emulator::load_matrices(m, address, true, where);
}
inline void store_matrices(u32 address, const u32 (&m)[4], Where where = Where::current()) {
  emulator::store_matrices(address, m, where);
}
inline u32 transpose_matrix(u32 rows, Where where = Where::current()) { return emulator::transpose_matrix(rows, where); }

template <typename T>
void mma_16x8x16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, Where where = Where::current()) {
  emulator::mma(EMULATED<T>, c, a, b0, b1, where);
}
