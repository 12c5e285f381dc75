// Sums and maxima over the lanes of a warp and the warps of a block.
#pragma once

#include "types.cuh"

// Over groups of LANES neighbouring lanes (a power of two); every lane gets the result.
template <int LANES = 32> __device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int step = LANES / 2; step; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}
template <int LANES = 32> __device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int step = LANES / 2; step; step /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
  return x;
}

// Over a block of THREADS (a multiple of 32); every thread gets the result. `scratch` is shared,
// one float a warp, and free again when the call returns.
template <int THREADS> __device__ __forceinline__ float block_sum(float x, float* scratch) {
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  float total = 0.f;
#pragma unroll
  for (int warp = 0; warp < THREADS / 32; ++warp) total += scratch[warp];
  __syncthreads();
  return total;
}
template <int THREADS> __device__ __forceinline__ float block_max(float x, float* scratch) {
  x = warp_max(x);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  float most = scratch[0];
#pragma unroll
  for (int warp = 1; warp < THREADS / 32; ++warp) most = fmaxf(most, scratch[warp]);
  __syncthreads();
  return most;
}
