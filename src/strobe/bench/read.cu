// A buffer read once by a kernel that does nothing else: what the memory gives.
//
// A thread an SM asks for PIECE bytes at a time in bulk, STAGES of them under way. Each piece's first word
// goes into a sum, which tells that all of them came.
#include "barrier.cuh"
#include "bulk_copy.cuh"
#include "ring.cuh"

struct Read {
  const char* data;  // pieces * PIECE bytes, aligned to 16
  u32* sum;          // of the pieces' first words, added to
  int pieces;
};

extern "C" __global__ void __launch_bounds__(32) read_once(const __grid_constant__ Read p) {
  extern __shared__ __align__(128) u8 ring[];
  __shared__ Barrier full[STAGES];
  if (threadIdx.x != 0) return;
  for (int stage = 0; stage < STAGES; ++stage) full[stage].init(1);
  fence_barrier_init();
  auto fetch = [&](int stage, int piece) {
    if (piece >= p.pieces) return;
    full[stage].arrive_expecting(PIECE);
    bulk_copy(ring + stage * PIECE, p.data + i64(piece) * PIECE, PIECE, full[stage]);
  };
  for (int stage = 0; stage < STAGES; ++stage) fetch(stage, blockIdx.x + stage * gridDim.x);
  u32 sum = 0;
  Ring<STAGES> at;
  for (int piece = blockIdx.x; piece < p.pieces; piece += gridDim.x) {
    full[at.stage].wait(at.parity);
    sum += *reinterpret_cast<const volatile u32*>(ring + at.stage * PIECE);
    fence_async_shared();  // the word is read before the next piece overwrites it
    fetch(at.stage, piece + STAGES * gridDim.x);
    at.advance();
  }
  atomicAdd(p.sum, sum);
}
