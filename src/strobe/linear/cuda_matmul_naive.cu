// out[t, o] = sum over i of x[t, i] weight[o, i] (+ bias[o]), a thread an output.
//
// Every thread reads its whole rows of x and weight from memory: each weight is read `tokens` times, and the
// lanes of a warp read 32 different rows, a few bytes of each cache line at a time.
#include "types.cuh"

// grid (outputs / 32, tokens / 8), block (32, 8)
extern "C" __global__ void __launch_bounds__(256)
multiply(const scalar_t* x, const scalar_t* weight, const scalar_t* bias, scalar_t* out, int tokens, int inputs,
         int outputs) {
  const int o = blockIdx.x * blockDim.x + threadIdx.x, t = blockIdx.y * blockDim.y + threadIdx.y;
  if (t >= tokens || o >= outputs) return;
  float sum = bias ? to_float(bias[o]) : 0.f;
  for (int i = 0; i < inputs; ++i) sum += to_float(x[i64(t) * inputs + i]) * to_float(weight[i64(o) * inputs + i]);
  out[i64(t) * outputs + o] = from_float<scalar_t>(sum);
}
