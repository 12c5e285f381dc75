// Keys and values in shared memory as the A operands of m16n8k16, whatever the cache's elements.
//
// An A operand is 16 x 16: keys by features for S^T = K Q^T, features by keys for O^T = V^T P^T. Of which
// feature a register speaks is free as long as q's operands and the output agree (k_feature, v_feature):
// 8-bit elements use that to be widened where they arrive, with no shuffles.
#pragma once

#include "mma.cuh"
#include "tile_stream.cuh"

// 16-bit elements.
template <class T>
struct ElementOperands {
  using mma_t = scalar_t;
  static constexpr int TILES = 1;  // of 16 features, loaded together

  // The first of the two features that this lane's `half` of a B operand of q holds ...
  static __device__ __forceinline__ int k_feature(int half) { return half * 8 + threadIdx.x % 4 * 2; }
  // ... and the feature of its rows lane / 4 and lane / 4 + 8 of O^T.
  static __device__ __forceinline__ int v_feature(int half) { return half * 8 + threadIdx.x % 32 / 4; }

  // Keys key .. key + 15, features 16 d .. 16 d + 15.
  static __device__ __forceinline__ void load_keys(u32 (&a)[1][4], u32 tile, int key, int d) {
    const int lane = threadIdx.x % 32;
    load_matrices(a[0], TileShape::address(tile, key + lane % 16, d * 32 + lane / 16 * 16));
  }
  static __device__ __forceinline__ void load_values(u32 (&a)[1][4], u32 tile, int key, int d) {
    const int lane = threadIdx.x % 32;
    load_matrices_transposed(
        a[0], TileShape::address(tile, key + lane / 16 * 8 + lane % 8, d * 32 + lane / 8 % 2 * 16));
  }
};

// The first two of four e4m3 numbers.
__device__ __forceinline__ u32 widen(u32 pair) { return f16_pair_of_e4m3(u16(pair)); }

// e4m3 elements: a matrix of ldmatrix is 8 keys x 16 features.
template <>
struct ElementOperands<u8> {
  using mma_t = f16;
  static constexpr int TILES = 2;

  static __device__ __forceinline__ int k_feature(int half) { return threadIdx.x % 4 * 4 + half * 2; }
  static __device__ __forceinline__ int v_feature(int half) { return threadIdx.x % 32 / 4 * 2 + half; }

  static __device__ __forceinline__ void load_keys(u32 (&a)[2][4], u32 tile, int key, int d) {
    u32 m[4];  // a lane: four features of key lane / 4 (+ 8) ...
    load_matrices(m, address(tile, key, d));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      a[i][0] = widen(m[2 * i]), a[i][2] = widen(m[2 * i] >> 16);
      a[i][1] = widen(m[2 * i + 1]), a[i][3] = widen(m[2 * i + 1] >> 16);
    }
  }
  static __device__ __forceinline__ void load_values(u32 (&a)[2][4], u32 tile, int key, int d) {
    u32 m[4];  // ... and two features of keys 2 (lane % 4) + {0, 1} (+ 8)
    load_matrices_transposed(m, address(tile, key, d));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const u32 even = widen(m[i]), odd = widen(m[i] >> 16);
      a[i / 2][i % 2 * 2] = __byte_perm(even, odd, 0x5410);
      a[i / 2][i % 2 * 2 + 1] = __byte_perm(even, odd, 0x7632);
    }
  }

 private:
  // Of this lane's row of the matrices. A row may end with 16 features: then those are loaded twice.
  static __device__ __forceinline__ u32 address(u32 tile, int key, int d) {
    const int lane = threadIdx.x % 32, second = d * 16 + 16 < HEAD_DIM ? lane / 16 * 16 : 0;
    return TileShape::address(tile, key + lane % 16, d * 16 + second);
  }
};

using Operands = ElementOperands<kv_t>;
using mma_t = Operands::mma_t;

// Two neighbouring features of a query, as the products take them.
__device__ __forceinline__ u32 query_pair(const scalar_t* q) {
  const u32 pair = *reinterpret_cast<const u32*>(q);
  if (sizeof(kv_t) == 2) return pair;
  const float2 wide = unpack<scalar_t>(pair);
  return pack<mma_t>(wide.x, wide.y);
}
