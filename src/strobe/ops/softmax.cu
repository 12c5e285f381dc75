// Softmax of each row (docs/math.md, eq. 2), a block a row: one pass for the maximum and the sum together
// (eq. 5 without its output), one to write.
#include "reduce.cuh"

constexpr int THREADS = 256;

// x and out [rows, columns], contiguous; grid: rows
extern "C" __global__ void __launch_bounds__(THREADS) softmax(const scalar_t* x, scalar_t* out, int columns) {
  __shared__ float scratch[THREADS / 32];
  x += i64(blockIdx.x) * columns, out += i64(blockIdx.x) * columns;

  float maximum = NEG_INF, sum = 0.f;  // of this thread's elements
  for (int i = threadIdx.x; i < columns; i += THREADS) {
    const float value = to_float(x[i]) * LOG2E, higher = fmaxf(maximum, value);
    if (higher == NEG_INF) continue;
    sum = sum * fast_exp2(maximum - higher) + fast_exp2(value - higher);
    maximum = higher;
  }
  const float highest = block_max<THREADS>(maximum, scratch);
  sum = block_sum<THREADS>(maximum == NEG_INF ? 0.f : sum * fast_exp2(maximum - highest), scratch);

  const float normal = sum > 0.f ? 1.f / sum : 0.f;
  for (int i = threadIdx.x; i < columns; i += THREADS)
    out[i] = from_float<scalar_t>(sum > 0.f ? fast_exp2(to_float(x[i]) * LOG2E - highest) * normal : 0.f);
}
