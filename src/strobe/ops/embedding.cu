// What a step begins with: each token's row of the embedding, and the cos and sin of its position.
//
// Defines: scalar_t.
#include "grid_dependency.cuh"
#include "types.cuh"

// Token t is token_ids[picks[t]], or token_ids[t] where picks is null; table [vocab, hidden], rows on 16 bytes;
// frequencies [head_dim]; x [tokens, hidden], cosines and sines [tokens, head_dim]; grid: tokens
extern "C" __global__ void __launch_bounds__(256)
embed(const i64* token_ids, const i64* picks, const i64* positions, const scalar_t* table,
      const float* frequencies, scalar_t* x, scalar_t* cosines, scalar_t* sines, int hidden, int head_dim) {
  const i64 token = blockIdx.x;
  grid_dependency_wait();
  grid_launch_dependents();
  const i64 id = token_ids[picks ? picks[token] : token];
  const uint4* const from = reinterpret_cast<const uint4*>(table + id * hidden);
  uint4* const to = reinterpret_cast<uint4*>(x + token * hidden);
  for (int i = threadIdx.x; i < hidden / VEC<scalar_t>; i += blockDim.x) to[i] = from[i];
  const float position = float(positions[token]);
  for (int i = threadIdx.x; i < head_dim; i += blockDim.x) {
    const float angle = position * frequencies[i];
    cosines[token * head_dim + i] = from_float<scalar_t>(cosf(angle));
    sines[token * head_dim + i] = from_float<scalar_t>(sinf(angle));
  }
}
