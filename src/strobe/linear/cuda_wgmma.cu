// out = behind(norm(x) weightᵀ + bias) for 17 to 64 tokens, every weight read once, in one launch.
//
// As in cuda_skinny.cu the time is the weights' bytes over the memory's bandwidth (docs/math.md, eq. 8). But x, which
// every block reads, is no longer small: with 32 tokens of it in each lane's ring there, 28672 x 4096 took 106 µs.
//
//   1. share     a cluster of blocks takes even rows of the weight, each block an even part of the columns
//   2. ask       a producer has the copy engine fill two rings, of the weight and of x. The first weights are asked for
//                before the kernel ahead has ended
//   3. scale     one warpgroup has x meet the norm's gains where it stands, and adds up its squares: it runs ahead
//   4. multiply  one warpgroup: the weight is wgmma's A operand, 64 rows at a time, the tokens are its B operand
//   5. add up    a token belongs to one block of the cluster: the others push what their columns gave it
//   6. finish    1 / rms, bias, then SwiGLU or the residual
//
// Defines: scalar_t, SWIGLU, NORM, TOKENS (at most, a multiple of 16), PART (rows of a cluster, with SWIGLU of its gates
// and of its ups, a multiple of 8), CLUSTER (blocks), STAGES and X_STAGES (of the rings, both at least 2; x comes from L2,
// so that its own may be the shorter).
#include "cluster.cuh"
#include "cluster_push.cuh"
#include "grid_dependency.cuh"
#include "tma.cuh"
#include "wgmma.cuh"

constexpr int CONSUMERS = 128, SCALERS = NORM ? 128 : 0, FINISHERS = CONSUMERS + SCALERS, THREADS = FINISHERS + 32;
constexpr int COLUMNS = 64;  // of a stage: 128 bytes of each row
constexpr int PARTS = SWIGLU ? 2 : 1;
constexpr int USED = PARTS * PART, ROWS = USED < 64 ? 64 : USED;  // of a stage
constexpr int TILES = ceil_div(ROWS, 64);                         // of 64 rows; the last may overlap the one ahead
constexpr int PITCH = USED + 4;                                   // floats of a token's sums; behind them its squares'
constexpr int PUSHED = USED / 4 + (NORM ? 1 : 0);                 // float4s of a token's sums
constexpr int OWN = TOKENS / CLUSTER;                             // tokens of a block, every CLUSTERth
constexpr Swizzle SWIZZLE = Swizzle::B128;

struct Params {
  const scalar_t* bias;  // [outputs] or null
  scalar_t* out;         // [tokens, units]
  int tokens, inputs, units;
  int each;      // units of a cluster, at most PART
  int residual;  // whether out holds what the result is added to
  float norm_eps;
};

struct Shared {
  union {
    struct {
      scalar_t weights[STAGES][ROWS * COLUMNS];
      scalar_t x[X_STAGES][TOKENS * COLUMNS];
    };
    struct {  // when all stages are used
      float sums[TOKENS][PITCH];                                  // of this block's columns
      float received[CLUSTER > 1 ? CLUSTER - 1 : 1][OWN][PITCH];  // of the others', for this block's tokens
    };
  };
  scalar_t gains[NORM ? X_STAGES : 1][COLUMNS];
  Barrier full[STAGES], empty[STAGES], x_full[X_STAGES], scaled[NORM ? X_STAGES : 1], summed;

  __device__ __forceinline__ void init(const Params& p, u32 rank) {
#pragma unroll
    for (int i = 0; i < STAGES; ++i) full[i].init(1), empty[i].init(CONSUMERS / 32);
#pragma unroll
    for (int i = 0; i < X_STAGES; ++i) {
      x_full[i].init(1);
      if (NORM) scaled[i].init(SCALERS / 32);
    }
    summed.init(1);
    fence_barrier_init();
    summed.arrive_expecting((CLUSTER - 1) * ceil_div(p.tokens - int(rank), CLUSTER) * PUSHED * sizeof(float4));
  }
};

// A block's part: units from `first` on, `stages` stages from column `column` on.
struct Share {
  const int rank = CLUSTER > 1 ? cluster_rank() : 0;
  int first, column, stages;

  __device__ __forceinline__ explicit Share(const Params& p) {
    const int all = ceil_div(p.inputs, COLUMNS), begin = rank * all / CLUSTER, end = (rank + 1) * all / CLUSTER;
    first = blockIdx.x / CLUSTER * p.each, column = begin * COLUMNS, stages = end - begin;
  }
};

// One thread that keeps the copy engine busy.
struct Producer {
  static constexpr u32 ROW_BYTES = COLUMNS * sizeof(scalar_t), X_BYTES = (TOKENS + (NORM ? 1 : 0)) * ROW_BYTES;
  const Params& p;
  const Share& share;
  Shared& s;
  const TensorMap &weight, &x, &norm;

  __device__ __forceinline__ void ask_weights(int i, int slot) const {
    s.full[slot].arrive_expecting(PARTS * p.each * ROW_BYTES);
#pragma unroll
    for (int part = 0; part < PARTS; ++part)
      tma_load_once(s.weights[slot] + part * PART * COLUMNS, weight, s.full[slot], share.column + i * COLUMNS,
                    share.first + part * p.units, 0, 0, 0);
  }
  __device__ __forceinline__ void ask_x(int i, int slot) const {
    s.x_full[slot].arrive_expecting(X_BYTES);
    tma_load(s.x[slot], x, s.x_full[slot], share.column + i * COLUMNS, 0, 0, 0, 0);
    if (NORM) tma_load(s.gains[slot], norm, s.x_full[slot], share.column + i * COLUMNS, 0, 0, 0, 0);
  }

  __device__ __forceinline__ void begin() const {
    for (int i = 0; i < min(STAGES, share.stages); ++i) ask_weights(i, i);
  }

  __device__ __forceinline__ void run() const {
    // Nothing that another kernel wrote is read, and nothing written, above this line.
    grid_dependency_wait();
    for (int i = 0; i < min(X_STAGES, share.stages); ++i) ask_x(i, i);
    Ring<STAGES> ring;
    Ring<X_STAGES> x_ring;
    for (int i = 0; i + X_STAGES < share.stages; ++i) {
      s.empty[ring.stage].wait(ring.parity);
      ask_x(i + X_STAGES, x_ring.stage);
      if (i + STAGES < share.stages) ask_weights(i + STAGES, ring.stage);
      ring.advance(), x_ring.advance();
    }
  }
};

// What stands behind the products. The block's threads finish four units of a token each, in turn.
struct Behind {
  static constexpr int QUADS = PART / 4, ITEMS = ceil_div(OWN * QUADS, FINISHERS);
  const Params& p;
  const Share& share;
  uint2 residual[ITEMS], bias[ITEMS][2];

  // Of this block's tokens.
  __device__ __forceinline__ static int own(int i) { return (threadIdx.x + i * FINISHERS) / QUADS; }
  __device__ __forceinline__ static int unit(int i) { return (threadIdx.x + i * FINISHERS) % QUADS * 4; }
  __device__ __forceinline__ int token(int i) const { return own(i) * CLUSTER + share.rank; }
  __device__ __forceinline__ bool present(int i) const {
    return token(i) < p.tokens && unit(i) < min(p.each, p.units - share.first);
  }
  __device__ __forceinline__ uint2* out(int i) const {
    return reinterpret_cast<uint2*>(p.out + i64(token(i)) * p.units + share.first + unit(i));
  }

  // Ask early for what is added late.
  __device__ __forceinline__ void load() {
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      if (!present(i)) continue;
      if (p.residual) residual[i] = *out(i);
#pragma unroll
      for (int part = 0; part < PARTS; ++part)
        if (p.bias) bias[i][part] = *reinterpret_cast<const uint2*>(p.bias + part * p.units + share.first + unit(i));
    }
  }

  // The sum over all columns of four floats of an item's token, in the order of the blocks' ranks.
  __device__ __forceinline__ float4 total(const Shared& s, int i, int at) const {
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
    for (int rank = 0; rank < CLUSTER; ++rank) {
      const float* const place =
          rank == share.rank ? s.sums[token(i)] : s.received[rank - (rank > share.rank)][own(i)];
      const float4 more = *reinterpret_cast<const float4*>(place + at);
      sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
    }
    return sum;
  }

  __device__ __forceinline__ static void add(float (&y)[4], uint2 four) {
    const float2 low = unpack<scalar_t>(four.x), high = unpack<scalar_t>(four.y);
    y[0] += low.x, y[1] += low.y, y[2] += high.x, y[3] += high.y;
  }

  __device__ __forceinline__ void store(const Shared& s) const {
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      if (!present(i)) continue;
      const float factor = NORM ? rsqrtf(total(s, i, USED).x / float(p.inputs) + p.norm_eps) : 1.f;
      float y[PARTS][4];
#pragma unroll
      for (int part = 0; part < PARTS; ++part) {
        const float4 sum = total(s, i, part * PART + unit(i));
        y[part][0] = sum.x * factor, y[part][1] = sum.y * factor, y[part][2] = sum.z * factor, y[part][3] = sum.w * factor;
        if (p.bias) add(y[part], bias[i][part]);
      }
      if constexpr (SWIGLU) {
#pragma unroll
        for (int e = 0; e < 4; ++e) y[0][e] *= fast_reciprocal(1.f + fast_exp2(-LOG2E * y[0][e])) * y[1][e];
      }
      if (p.residual) add(y[0], residual[i]);
      *out(i) = make_uint2(pack<scalar_t>(y[0][0], y[0][1]), pack<scalar_t>(y[0][2], y[0][3]));
    }
  }
};

// One warpgroup that has x meet the gains, and adds up its squares: eight threads a token.
struct Scaler {
  static constexpr int PIECES = TOKENS / 16;  // of 16 bytes, of a thread in a stage
  Shared& s;
  const int thread = threadIdx.x - CONSUMERS;
  float squares[PIECES] = {};

  __device__ __forceinline__ explicit Scaler(Shared& s) : s(s) {}

  __device__ __forceinline__ void scale(int slot) {
    const int row = thread / 8, piece = thread % 8;  // as they stand in the swizzled stage
    const uint4 gains = reinterpret_cast<const uint4*>(s.gains[slot])[piece ^ row % 8];
    uint4* const x = reinterpret_cast<uint4*>(s.x[slot]) + thread;
#pragma unroll
    for (int i = 0; i < PIECES; ++i) {
      const uint4 raw = x[i * SCALERS];
      float value[8];
      to_floats(raw, value, scalar_t{});
#pragma unroll
      for (int e = 0; e < 8; ++e) squares[i] += value[e] * value[e];
      x[i * SCALERS] =
          make_uint4(multiply_pairs<scalar_t>(raw.x, gains.x), multiply_pairs<scalar_t>(raw.y, gains.y),
                     multiply_pairs<scalar_t>(raw.z, gains.z), multiply_pairs<scalar_t>(raw.w, gains.w));
    }
  }

  __device__ __forceinline__ void run(int stages) {
    Ring<X_STAGES> ring;
    for (int i = 0; i < stages; ++i) {
      s.x_full[ring.stage].wait(ring.parity);
      scale(ring.stage);
      fence_async_shared();
      __syncwarp();
      if (threadIdx.x % 32 == 0) s.scaled[ring.stage].arrive();
      ring.advance();
    }
  }

  // Behind this block's sums.
  __device__ __forceinline__ void store() const {
#pragma unroll
    for (int i = 0; i < PIECES; ++i) {
      float sum = squares[i];
#pragma unroll
      for (int lanes = 1; lanes < 8; lanes *= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
      if (thread % 8 == 0) *reinterpret_cast<float4*>(&s.sums[i * 16 + thread / 8][USED]) = {sum, 0, 0, 0};
    }
  }
};

// One warpgroup that multiplies.
struct Consumer {
  Shared& s;
  float products[TILES][TOKENS / 2] = {};

  __device__ __forceinline__ explicit Consumer(Shared& s) : s(s) {}

  // Where a tile begins.
  __device__ __forceinline__ static constexpr int row_of(int tile) {
    return tile * 64 + 64 > ROWS ? ROWS - 64 : tile * 64;
  }

  __device__ __forceinline__ void multiply(int slot, int x_slot) {
    const u64 b = matrix_descriptor<SWIZZLE>(shared_address(s.x[x_slot]), 16);
    wgmma_fence();
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      const u64 a = matrix_descriptor<SWIZZLE>(shared_address(s.weights[slot] + row_of(tile) * COLUMNS), 16);
#pragma unroll
      for (int step = 0; step < COLUMNS / 16; ++step)
        Wgmma<scalar_t, TOKENS>::template ss<true>(products[tile], a + step * 2, b + step * 2);
    }
    wgmma_commit();
  }

  __device__ __forceinline__ void run(int stages) {
    Ring<STAGES> ring;
    Ring<X_STAGES> x_ring;
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) pin(products[tile]);
    for (int i = 0; i < stages; ++i) {
      (NORM ? s.scaled : s.x_full)[x_ring.stage].wait(x_ring.parity);
      s.full[ring.stage].wait(ring.parity);
      multiply(ring.stage, x_ring.stage);
      wgmma_wait<0>();
      if (threadIdx.x % 32 == 0) s.empty[ring.stage].arrive();
      ring.advance(), x_ring.advance();
    }
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) pin(products[tile]);
  }

  // To this block's sums, in the rings' place.
  __device__ __forceinline__ void store() const {
    const int pair = threadIdx.x % 4;
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      const int row = row_of(tile) + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
#pragma unroll
      for (int i = 0; i < TOKENS / 2; ++i) {
        const int at = row + i / 2 % 2 * 8;
        if (at >= tile * 64 && at < USED) s.sums[i / 4 * 8 + pair * 2 + i % 2][at] = products[tile][i];
      }
    }
  }
};

// Give each token's sums of this block's columns to the block that it belongs to.
__device__ __forceinline__ void deal(const Params& p, const Share& share, Shared& s) {
  for (int i = threadIdx.x; i < p.tokens * PUSHED; i += FINISHERS) {
    const int token = i / PUSHED, at = i % PUSHED * 4, rank = token % CLUSTER;
    if (rank == share.rank) continue;
    push(reinterpret_cast<float4*>(s.received[share.rank - (share.rank > rank)][token / CLUSTER] + at),
         *reinterpret_cast<const float4*>(s.sums[token] + at), s.summed, rank);
  }
}

// x: boxes of COLUMNS x TOKENS; weight: of COLUMNS x `each`; norm: of COLUMNS, where NORM
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    project(const __grid_constant__ TensorMap weight, const __grid_constant__ TensorMap x,
            const __grid_constant__ TensorMap norm, const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) u8 memory[];
  Shared& s = *reinterpret_cast<Shared*>(memory);
  const Share share(p);
  const Producer producer = {p, share, s, weight, x, norm};
  if (threadIdx.x == FINISHERS) {
    prefetch(weight), prefetch(x);
    s.init(p, share.rank);
    fence_async_shared();
    producer.begin();
  }
  __syncthreads();
  if (threadIdx.x >= FINISHERS) {
    if (threadIdx.x == FINISHERS) producer.run();
    return;
  }
  grid_dependency_wait();
  grid_launch_dependents();
  Behind behind = {p, share};
  behind.load();

  // The sums take the rings' place when nobody of this block reads these, and nobody is pushed to before that.
  if (threadIdx.x < CONSUMERS) {
    Consumer consumer(s);
    consumer.run(share.stages);
    named_sync<FINISHERS>(1);
    if (CLUSTER > 1) cluster_arrive();
    consumer.store();
  } else if constexpr (NORM) {
    Scaler scaler(s);
    scaler.run(share.stages);
    named_sync<FINISHERS>(1);
    if (CLUSTER > 1) cluster_arrive();
    scaler.store();
  }
  named_sync<FINISHERS>(1);
  if constexpr (CLUSTER > 1) {
    cluster_wait();
    deal(p, share, s);
    s.summed.wait(0);
  }
  behind.store(s);
}
