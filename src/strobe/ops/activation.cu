// silu(gate) * up, 16 bytes a thread.
//
// Defines: scalar_t.
#include "grid_dependency.cuh"
#include "types.cuh"

// gate_up [rows, 2 columns], the gates first; out [rows, columns]; columns are whole vectors of 16 bytes.
// grid: rows x columns / vector / 256
extern "C" __global__ void __launch_bounds__(256)
swiglu(const scalar_t* gate_up, scalar_t* out, int columns, int vectors) {
  constexpr int EACH = VEC<scalar_t>;
  const int vector = blockIdx.x * blockDim.x + threadIdx.x;
  grid_dependency_wait();
  grid_launch_dependents();
  if (vector >= vectors) return;
  const int each_row = columns / EACH, row = vector / each_row;
  const scalar_t* const gate = gate_up + i64(vector + i64(row) * each_row) * EACH;
  float g[EACH], u[EACH];
  load_floats(gate, g);
  load_floats(gate + columns, u);
#pragma unroll
  for (int e = 0; e < EACH; ++e) g[e] *= fast_reciprocal(1.f + fast_exp2(-LOG2E * g[e])) * u[e];
  store_floats(out + i64(vector) * EACH, g);
}
