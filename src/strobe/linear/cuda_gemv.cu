// out[t, o] = sum over i of x[t, i] weight[o, i] (+ bias[o]) for a few tokens, a warp ROWS outputs.
//
// With one token every weight is used once, so the time is the weights' bytes over the memory's bandwidth
// (docs/math.md, eq. 8). All that matters is bytes in flight: 16-byte loads, ROWS x UNROLL of them started
// before the first is used, in enough warps. x is small, and comes from cache.
#include "memory.cuh"
#include "reduce.cuh"

constexpr int UNROLL = 4;
constexpr int STEP = 32 * VEC<scalar_t>;  // elements of a row that a warp takes at a time

// grid: outputs / (WARPS x ROWS). inputs is a multiple of VEC, rows stand on 16 bytes.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
multiply(const scalar_t* x, const scalar_t* weight, const scalar_t* bias, scalar_t* out, int inputs, int outputs) {
  const int lane = threadIdx.x % 32;
  const int first_o = (blockIdx.x * WARPS + threadIdx.x / 32) * ROWS;
  if (first_o >= outputs) return;
  const scalar_t* rows[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) rows[r] = weight + i64(min(first_o + r, outputs - 1)) * inputs;

  float sum[ROWS][TOKENS] = {};
  for (int i = lane * VEC<scalar_t>; i < inputs; i += UNROLL * STEP) {
    uint4 raw[UNROLL][ROWS];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u)
#pragma unroll
      for (int r = 0; r < ROWS; ++r)
        raw[u][r] = i + u * STEP < inputs ? load_once(rows[r] + i + u * STEP) : make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      if (i + u * STEP >= inputs) break;
#pragma unroll
      for (int t = 0; t < TOKENS; ++t) {
        float a[VEC<scalar_t>];
        load_floats(x + i64(t) * inputs + i + u * STEP, a);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
          float w[VEC<scalar_t>];
          to_floats(raw[u][r], w, scalar_t{});
#pragma unroll
          for (int e = 0; e < VEC<scalar_t>; ++e) sum[r][t] += w[e] * a[e];
        }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r)
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
      const float total = warp_sum(sum[r][t]);
      const int o = first_o + r;
      if (lane == 0 && o < outputs)
        out[i64(t) * outputs + o] = from_float<scalar_t>(total + (bias ? to_float(bias[o]) : 0.f));
    }
}
