// Warp-wide tensor-core products: mma.sync m16n8k16 with fp32 accumulation, ldmatrix and movmatrix (sm_80 and up).
//
// Who holds what, with row = lane / 4 and pair = lane % 4 (PTX ISA, "Matrix Fragments for mma.m16n8k16"):
//   A [16 x 16]  a[0], a[2]: row `row`, columns 2 pair + {0, 1} and + 8;  a[1], a[3]: row `row + 8`
//   B [16 x 8]   b[0], b[1]: column `row`, rows 2 pair + {0, 1} and + 8
//   C [16 x 8]   c[0..1]: row `row`, columns 2 pair + {0, 1};  c[2..3]: row `row + 8`
// The accumulators of two neighbouring n-tiles, packed, are therefore one A operand.
#pragma once

#include "types.cuh"

// Four 8x8 matrices of 16-bit elements. Lanes 8i .. 8i + 7 give the addresses of matrix i's rows.
__device__ __forceinline__ void load_matrices(u32 (&m)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(address));
}

__device__ __forceinline__ void load_matrices_transposed(u32 (&m)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(address));
}

// The way back (sm_90): lane's rows and columns as C has them, lanes 8i .. 8i + 7 give where matrix i's rows go.
__device__ __forceinline__ void store_matrices(u32 address, const u32 (&m)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(m[0]), "r"(m[1]),
               "r"(m[2]), "r"(m[3])
               : "memory");
}

// An 8x8 matrix across the warp: a lane gives two neighbours of row lane / 4, and gets two of column lane / 4.
__device__ __forceinline__ u32 transpose_matrix(u32 rows) {
  u32 columns;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(columns) : "r"(rows));
  return columns;
}

// c += a b
template <typename T>
__device__ __forceinline__ void mma_16x8x16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1);

template <>
__device__ __forceinline__ void mma_16x8x16<f16>(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void mma_16x8x16<bf16>(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
