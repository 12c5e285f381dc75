// Flash-Decoding: a row's keys split over blocks, in two kernels (docs/math.md, eq. 6).
//
//   partials  a block attends to its share of a row's keys and leaves (o, m, l) in a workspace
//   merge     the shares of a row are rescaled to their common maximum and summed
//
// The machine is full at any batch. What it wastes: the heads of a group still read the same keys each
// for itself, every row is split alike however short, and the second kernel waits for the whole first.
#include "warp_row.cuh"

constexpr int WARPS = 4;

struct Workspace {
  float *o, *m, *l;  // [batch, q_heads, splits(, HEAD_DIM)]
};

// grid (splits, q_heads, batch)
extern "C" __global__ void __launch_bounds__(WARPS * 32)
partials(const __grid_constant__ DecodeParams p, const __grid_constant__ Workspace w) {
  __shared__ float o[WARPS][HEAD_DIM], m[WARPS], l[WARPS];
  const int split = blockIdx.x, head = blockIdx.y, row = blockIdx.z, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int kv_len = p.seq_lens[row], each = (kv_len + gridDim.x - 1) / gridDim.x;
  WarpRow query(p.query(row, head), p.scale_log2);
  query.attend(p.keys(row, head), p.values(row, head), split * each + warp, min(kv_len, (split + 1) * each), WARPS);
#pragma unroll
  for (int i = 0; i < FEATURES; ++i) o[warp][lane * FEATURES + i] = query.out[i];
  if (lane == 0) m[warp] = query.maximum, l[warp] = query.sum;
  __syncthreads();
  const i64 at = (i64(row) * gridDim.y + head) * gridDim.x + split;
  for (int d = threadIdx.x; d < HEAD_DIM; d += WARPS * 32) {
    float maximum, sum;
    const float x = merge_feature(o[0], m, l, WARPS, HEAD_DIM, d, maximum, sum);
    w.o[at * HEAD_DIM + d] = x;  // divided by its sum already
    if (d == 0) w.m[at] = maximum, w.l[at] = sum;
  }
}

// grid (q_heads, batch), a thread a feature
extern "C" __global__ void merge(const __grid_constant__ DecodeParams p, const __grid_constant__ Workspace w,
                                 int splits) {
  const int head = blockIdx.x, row = blockIdx.y;
  const i64 at = (i64(row) * gridDim.x + head) * splits;
  float maximum = NEG_INF, sum = 0.f, total = 0.f;
  for (int i = 0; i < splits; ++i) maximum = fmaxf(maximum, w.m[at + i]);
  for (int i = 0; i < splits; ++i) {
    if (w.m[at + i] == NEG_INF) continue;  // a share without keys
    const float share = fast_exp2(w.m[at + i] - maximum) * w.l[at + i];
    sum += share;
    total += share * w.o[(at + i) * HEAD_DIM + threadIdx.x];
  }
  p.write(row, head, threadIdx.x, sum > 0.f ? total / sum : 0.f);
  if (threadIdx.x == 0) p.write_lse(row, head, gridDim.x, maximum, sum);
}
