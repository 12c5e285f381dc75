// RMSNorm of each row, a block a row: read once into registers, summed, scaled, written.
//
// Defines: scalar_t, VECTORS (of 16 bytes that a thread holds).
#include "grid_dependency.cuh"
#include "reduce.cuh"

constexpr int THREADS = 256;

// x and out [rows, columns], weight [columns], rows on 16 bytes; grid: rows
extern "C" __global__ void __launch_bounds__(THREADS)
rms_norm(const scalar_t* x, const scalar_t* weight, scalar_t* out, int columns, float eps) {
  constexpr int EACH = VEC<scalar_t>;
  __shared__ float scratch[THREADS / 32];
  x += i64(blockIdx.x) * columns, out += i64(blockIdx.x) * columns;
  grid_dependency_wait();
  grid_launch_dependents();

  // All loads first: one trip to memory, not one for each.
  uint4 raw[VECTORS], gains[VECTORS];
#pragma unroll
  for (int i = 0; i < VECTORS; ++i) {
    const int at = (i * THREADS + threadIdx.x) * EACH;
    raw[i] = gains[i] = make_uint4(0, 0, 0, 0);
    if (at < columns) {
      raw[i] = *reinterpret_cast<const uint4*>(x + at);
      gains[i] = *reinterpret_cast<const uint4*>(weight + at);
    }
  }
  float squares = 0.f;
#pragma unroll
  for (int i = 0; i < VECTORS; ++i) {
    float value[EACH];
    to_floats(raw[i], value, scalar_t{});
#pragma unroll
    for (int e = 0; e < EACH; ++e) squares += value[e] * value[e];
  }
  const float factor = rsqrtf(block_sum<THREADS>(squares, scratch) / float(columns) + eps);
#pragma unroll
  for (int i = 0; i < VECTORS; ++i) {
    const int at = (i * THREADS + threadIdx.x) * EACH;
    if (at >= columns) break;
    float value[EACH], gain[EACH];
    to_floats(raw[i], value, scalar_t{});
    to_floats(gains[i], gain, scalar_t{});
#pragma unroll
    for (int e = 0; e < EACH; ++e) value[e] *= factor * gain[e];
    store_floats(out + at, value);
  }
}
