// Where a wgmma operand stands in shared memory (PTX ISA, "Matrix Descriptor Format").
#pragma once

#include "types.cuh"

// Bytes of a row of a swizzled panel in shared memory, as the tensor map that filled it has them.
enum class Swizzle : int { B128 = 128, B64 = 64 };

// Panels of rows of SWIZZLE bytes, rows in groups of 8. A K-major operand steps through k along its rows (`panel_bytes`
// is not used); an MN-major one has k down its rows, and its next columns in the next panel.
template <Swizzle SWIZZLE>
__device__ __forceinline__ u64 matrix_descriptor(u32 address, u32 panel_bytes) {
  constexpr u64 ROW_GROUP = 8 * int(SWIZZLE), LAYOUT = SWIZZLE == Swizzle::B128 ? 1 : 2;
  return LAYOUT << 62 | (ROW_GROUP >> 4) << 32 | u64(panel_bytes >> 4) << 16 | (address & 0x3ffff) >> 4;
}

// Where `byte` of a panel's row stands, from the panel's start: chunks of 16 bytes change places within a row.
template <Swizzle SWIZZLE>
__device__ __forceinline__ u32 swizzled(int row, int byte) {
  constexpr int PITCH = int(SWIZZLE), CHUNKS = PITCH / 16;
  return row * PITCH + (byte ^ row * PITCH / 128 % CHUNKS * 16);
}
