// Flash decode in one kernel: a block a query head of a row, its warps deal the keys among themselves, and
// what each has summed is merged at the end (docs/math.md, eq. 5 and 6).
//
// What it wastes: a batch of one with 32 heads keeps 32 SMs busy and leaves 100 idle, and the heads of a
// group read the same keys each for itself.
#include "warp_row.cuh"

constexpr int WARPS = 8;

// grid (q_heads, batch)
extern "C" __global__ void __launch_bounds__(WARPS * 32) decode(const __grid_constant__ DecodeParams p) {
  __shared__ float o[WARPS][HEAD_DIM], m[WARPS], l[WARPS];
  const int head = blockIdx.x, row = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  WarpRow query(p.query(row, head), p.scale_log2);
  query.attend(p.keys(row, head), p.values(row, head), warp, p.seq_lens[row], WARPS);
#pragma unroll
  for (int i = 0; i < FEATURES; ++i) o[warp][lane * FEATURES + i] = query.out[i];
  if (lane == 0) m[warp] = query.maximum, l[warp] = query.sum;
  __syncthreads();
  for (int d = threadIdx.x; d < HEAD_DIM; d += WARPS * 32) {
    float maximum, sum;
    p.write(row, head, d, merge_feature(o[0], m, l, WARPS, HEAD_DIM, d, maximum, sum));
    if (d == 0) p.write_lse(row, head, gridDim.x, maximum, sum);
  }
}
