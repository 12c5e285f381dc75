// out[t, o] = sum over i of x[t, i] weight[o, i] (+ bias[o]), a block TILE x TILE outputs, a thread 4 x 4.
//
// DEPTH columns of x and of weight at a time come through shared memory, so each is read from memory once for
// TILE outputs; a thread's 4 x 4 outputs take 8 shared values for 16 multiply-adds.
#include "types.cuh"

constexpr int TILE = 64, DEPTH = 16, SIDE = 4;
constexpr int THREADS = TILE / SIDE * (TILE / SIDE);
constexpr int PITCH = TILE + 4;

// Rows [first, first + TILE), columns [column, column + DEPTH) of [rows, columns], turned: tile[column][row].
__device__ __forceinline__ void load_turned(float (&tile)[DEPTH][PITCH], const scalar_t* from, int first, int rows,
                                            int column, int columns) {
#pragma unroll
  for (int at = threadIdx.x; at < TILE * DEPTH; at += THREADS) {
    const int row = at / DEPTH, i = at % DEPTH;
    const bool inside = first + row < rows && column + i < columns;
    tile[i][row] = inside ? to_float(from[i64(first + row) * columns + column + i]) : 0.f;
  }
}

// grid (outputs / TILE, tokens / TILE), block THREADS
extern "C" __global__ void __launch_bounds__(THREADS)
multiply(const scalar_t* x, const scalar_t* weight, const scalar_t* bias, scalar_t* out, int tokens, int inputs,
         int outputs) {
  __shared__ alignas(16) float x_tile[DEPTH][PITCH], weight_tile[DEPTH][PITCH];
  const int first_o = blockIdx.x * TILE, first_t = blockIdx.y * TILE;
  const int column = threadIdx.x % (TILE / SIDE) * SIDE, row = threadIdx.x / (TILE / SIDE) * SIDE;

  float sum[SIDE][SIDE] = {};
  for (int i = 0; i < inputs; i += DEPTH) {
    __syncthreads();
    load_turned(x_tile, x, first_t, tokens, i, inputs);
    load_turned(weight_tile, weight, first_o, outputs, i, inputs);
    __syncthreads();
#pragma unroll
    for (int depth = 0; depth < DEPTH; ++depth) {
      const float4 a = *reinterpret_cast<const float4*>(&x_tile[depth][row]);
      const float4 b = *reinterpret_cast<const float4*>(&weight_tile[depth][column]);
      const float left[SIDE] = {a.x, a.y, a.z, a.w}, right[SIDE] = {b.x, b.y, b.z, b.w};
#pragma unroll
      for (int r = 0; r < SIDE; ++r)
#pragma unroll
        for (int c = 0; c < SIDE; ++c) sum[r][c] += left[r] * right[c];
    }
  }
#pragma unroll
  for (int r = 0; r < SIDE; ++r)
#pragma unroll
    for (int c = 0; c < SIDE; ++c) {
      const int t = first_t + row + r, o = first_o + column + c;
      if (t < tokens && o < outputs)
        out[i64(t) * outputs + o] = from_float<scalar_t>(sum[r][c] + (bias ? to_float(bias[o]) : 0.f));
    }
}
