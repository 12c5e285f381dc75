// out = behind(norm(x) weightᵀ + bias) for up to 16 tokens, every weight read once, in one launch.
//
// The time is the weights' bytes over the memory's bandwidth (docs/math.md, eq. 8); all else must hide behind it.
//
//   1. share     a block takes a few tiles of 8 rows, its warps every eighth group of 64 columns
//   2. ask       a lane copies what it will multiply to a ring of its own in shared memory (cp.async): no barrier stands
//                between the memory and the product. Weights depend on nothing: the first are asked for before the
//                kernel ahead has ended
//   3. multiply  weights are mma.sync's B operand (8 rows), x its A operand (16 tokens): CUDA cores could not keep up
//                with the memory for 8 tokens
//   4. finish    the warps, each with its columns, add up; 1 / rms, bias, then SwiGLU, or the residual, or rope and the
//                append: queries rotated to where attention reads them, keys and values straight to their pages
//
// Of 32 columns a lane takes the eight from lane % 4 * 8 on, of both operands: a product does not mind in which order its
// terms are added, and 16 bytes are one copy. RMSNorm's factor is one number a token: it waits until the end, and x meets
// the norm's gains alone on the way in.
//
// Defines: scalar_t, SWIGLU, NORM, TOKENS (at most, a power of two), TILES (of a block), DEPTH (stages of a ring);
// HEAD_DIM (of the heads that are appended; 0: none are), kv_t (the cache's element: scalar_t, or u8 for e4m3).
#include "appended_heads.cuh"
#include "async_copy.cuh"
#include "grid_dependency.cuh"
#include "mma.cuh"

constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr int STEPS = 2, GROUP = 32 * STEPS;  // columns of a stage: 128 bytes of each row
constexpr int STRIDE = WARPS * GROUP;         // from a warp's stage to its next
constexpr int ROWS = 8;                       // of a tile
constexpr bool PAIRS = SWIGLU || APPEND;
constexpr int UNITS = PAIRS ? 4 : 8;  // a tile's: a unit is one row, or two: a gate's and its up's, or what rope turns
constexpr int BLOCK_UNITS = TILES * UNITS;
constexpr int EIGHTS = ceil_div(TOKENS, 8);  // of tokens
constexpr int PITCH = TILES * ROWS + 4;      // floats

// A stage of a warp's ring, in 16 bytes.
constexpr int WEIGHTS = TILES * STEPS * 32, XS = STEPS * TOKENS * 4, GAINS = NORM ? STEPS * 4 : 0;
constexpr int STAGE = WEIGHTS + XS + GAINS;

struct Params {
  const scalar_t *x, *weight, *bias, *norm;  // [tokens, inputs], [outputs, inputs], [outputs] or null, [inputs]
  scalar_t* out;                             // [tokens, units], or the queries [tokens, q_heads, HEAD_DIM]
  int tokens, inputs, outputs;
  int each;      // units of a block
  int residual;  // whether out holds what the result is added to
  float norm_eps;
  Heads heads;
};

// A block's units, in even tiles.
struct Share {
  int units, first, count, tile_most;

  __device__ __forceinline__ explicit Share(const Params& p) : units(PAIRS ? p.outputs / 2 : p.outputs) {
    first = blockIdx.x * p.each, count = min(p.each, units - first);
    tile_most = ceil_div(count, ceil_div(count, UNITS));
  }
  // Which row of the weight a unit begins with, and how far behind it the other one is.
  __device__ __forceinline__ int row(int unit) const {
    return first + unit + (APPEND ? (first + unit) / HALF * HALF : 0);
  }
  __device__ __forceinline__ int to_other() const {
    return APPEND ? HALF : units;  // up's rows stand behind all of the gates'
  }
};

// What a lane asks for: of each tile row lane / 4, of x tokens lane / 4 and + 8.
struct Lane {
  const int inputs, column = threadIdx.x / 32 * GROUP + threadIdx.x % 4 * 8;  // of its first stage
  const scalar_t* rows[TILES];
  u32 present = 0;  // a bit a tile: whether it has this row

  __device__ __forceinline__ Lane(const Params& p, const Share& share) : inputs(p.inputs) {
    const int row = threadIdx.x % 32 / 4;
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      const int unit = tile * share.tile_most + row % UNITS;
      rows[tile] = p.weight + i64(share.row(unit) + (row < UNITS ? 0 : share.to_other())) * inputs;
      if (row % UNITS < share.tile_most && unit < share.count) present |= 1u << tile;
    }
  }

  __device__ __forceinline__ void ask_weights(int first, uint4* stage) const {
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
      for (int step = 0; step < STEPS; ++step) {
        const int at = first + step * 32;
        copy_async_16(shared_address(stage + (tile * STEPS + step) * 32 + threadIdx.x % 32), rows[tile] + at,
                      present >> tile & 1 && at < inputs);
      }
  }

  __device__ __forceinline__ void ask_x(const Params& p, int first, uint4* stage) const {
    const int row = threadIdx.x % 32 / 4, piece = threadIdx.x % 4;
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      const int at = first + step * 32;
#pragma unroll
      for (int token = row; token < TOKENS; token += 8)
        if (token < p.tokens)
          copy_async_16(shared_address(stage + WEIGHTS + (step * TOKENS + token) * 4 + piece),
                        p.x + i64(token) * inputs + at, at < inputs);
      if (NORM && row == 0)
        copy_async_16(shared_address(stage + WEIGHTS + XS + step * 4 + piece), p.norm + at, at < inputs);
    }
  }
};

// 16 tokens x 32 columns: two A operands of mma.sync.
struct Tokens {
  uint4 low = {}, high = {};  // tokens lane / 4 and + 8

  __device__ __forceinline__ Tokens(const Params& p, const uint4* stage, int step) {
    const int row = threadIdx.x % 32 / 4;
    const uint4* const x = stage + WEIGHTS + step * TOKENS * 4 + threadIdx.x % 32;
    if (row < p.tokens) low = x[0];
    if (TOKENS > 8 && row + 8 < p.tokens) high = x[32];
  }
  // c [16 tokens x 8] += these times the 32 columns of b.
  __device__ __forceinline__ void multiply(float (&c)[4], const uint4& b) const {
    mma_16x8x16<scalar_t>(c, {low.x, high.x, low.y, high.y}, b.x, b.y);
    mma_16x8x16<scalar_t>(c, {low.z, high.z, low.w, high.w}, b.z, b.w);
  }
  __device__ __forceinline__ void scale(const uint4& gains) {
    low = scaled(low, gains);
    if (TOKENS > 8) high = scaled(high, gains);
  }

 private:
  __device__ __forceinline__ static uint4 scaled(const uint4& x, const uint4& gains) {
    return make_uint4(multiply_pairs<scalar_t>(x.x, gains.x), multiply_pairs<scalar_t>(x.y, gains.y),
                      multiply_pairs<scalar_t>(x.z, gains.z), multiply_pairs<scalar_t>(x.w, gains.w));
  }
};

struct Sums {
  float products[TILES][4] = {};  // [16 tokens x 8 rows]
  float squares[EIGHTS][4] = {};  // of x xᵀ [16 x 8], whose diagonal is wanted

  // Add a stage.
  __device__ __forceinline__ void add(const Params& p, const uint4* stage) {
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      Tokens tokens(p, stage, step);
      if (NORM) {
        tokens.multiply(squares[0], tokens.low);
        if (EIGHTS > 1) tokens.multiply(squares[EIGHTS - 1], tokens.high);
        tokens.scale(stage[WEIGHTS + XS + step * 4 + threadIdx.x % 4]);
      }
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile)
        tokens.multiply(products[tile], stage[(tile * STEPS + step) * 32 + threadIdx.x % 32]);
    }
  }

  // To `shared` [tokens][PITCH] and `shared_squares` [TOKENS] of this warp.
  __device__ __forceinline__ void store(const Params& p, float* shared, float* shared_squares) const {
    const int row = threadIdx.x % 32 / 4, pair = threadIdx.x % 4;
#pragma unroll
    for (int half = 0; half < EIGHTS; ++half) {
      const int token = half * 8 + row;
      if (token >= p.tokens) continue;
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile)
        *reinterpret_cast<float2*>(shared + token * PITCH + tile * ROWS + pair * 2) =
            make_float2(products[tile][half * 2], products[tile][half * 2 + 1]);
      if (NORM && pair == row / 2)
        shared_squares[token] = row % 2 ? squares[half][half * 2 + 1] : squares[half][half * 2];
    }
  }
};

// What stands behind the products. A thread finishes every THREADSth of the block's results.
struct Behind {
  static constexpr int ITEMS = ceil_div(BLOCK_UNITS * TOKENS, THREADS);
  scalar_t residual[ITEMS], bias[ITEMS][2];
  FeaturePair features[ITEMS];

  __device__ __forceinline__ static int token(int i) { return (threadIdx.x + i * THREADS) / BLOCK_UNITS; }
  __device__ __forceinline__ static int unit(int i) { return (threadIdx.x + i * THREADS) % BLOCK_UNITS; }
  __device__ __forceinline__ static bool present(const Params& p, const Share& share, int i) {
    return unit(i) < share.count && token(i) < p.tokens;
  }
  __device__ __forceinline__ static scalar_t* out(const Params& p, const Share& share, int i) {
    return p.out + i64(token(i)) * share.units + share.first + unit(i);
  }

  // Ask early for what is added late.
  __device__ __forceinline__ void load(const Params& p, const Share& share) {
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      if (!present(p, share, i)) continue;
      if (p.residual) residual[i] = *out(p, share, i);
      if (p.bias) {
        bias[i][0] = p.bias[share.row(unit(i))];
        if (PAIRS) bias[i][1] = p.bias[share.to_other() + share.row(unit(i))];
      }
      if (APPEND) features[i].load(p.heads, token(i), share.first + unit(i));
    }
  }

  // sums [WARPS][tokens][PITCH]
  __device__ __forceinline__ void store(const Params& p, const Share& share, const float* sums,
                                        const float (&squares)[WARPS][TOKENS]) const {
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      if (!present(p, share, i)) continue;
      const int row = unit(i) / share.tile_most * ROWS + unit(i) % share.tile_most;
      float total[2] = {}, square = 0.f;
#pragma unroll
      for (int warp = 0; warp < WARPS; ++warp) {
        const float* const at = sums + (warp * p.tokens + token(i)) * PITCH + row;
        total[0] += at[0];
        if (PAIRS) total[1] += at[UNITS];
        if (NORM) square += squares[warp][token(i)];
      }
      const float factor = NORM ? rsqrtf(square / float(p.inputs) + p.norm_eps) : 1.f;
#pragma unroll
      for (int half = 0; half < (PAIRS ? 2 : 1); ++half) {
        total[half] *= factor;
        if (p.bias) total[half] += to_float(bias[i][half]);
      }
      if (APPEND) {
        features[i].store(p.heads, p.out, token(i), share.first + unit(i), total[0], total[1]);
        continue;
      }
      float y = total[0];
      if (SWIGLU) y *= fast_reciprocal(1.f + fast_exp2(-LOG2E * y)) * total[1];
      if (p.residual) y += to_float(residual[i]);
      *out(p, share, i) = from_float<scalar_t>(y);
    }
  }
};

// Dynamic shared memory: the warps' rings [WARPS][DEPTH][STAGE] of 16 bytes, then in their place the sums [WARPS][tokens]
// [PITCH] of floats, whichever takes more.
constexpr int BLOCKS = APPEND && TOKENS > 8 ? 1 : 2;  // of an SM: with so many tokens, rings take more than half of it
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) project(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) uint4 dynamic[];
  __shared__ float squares[WARPS][TOKENS];
  const int warp = threadIdx.x / 32, stages = ceil_div(max(0, p.inputs - warp * GROUP), STRIDE);
  uint4* const ring = dynamic + warp * DEPTH * STAGE;
  const Share share(p);
  const Lane lane(p, share);

#pragma unroll
  for (int i = 0; i < DEPTH; ++i) {
    if (i < stages) lane.ask_weights(lane.column + i * STRIDE, ring + i * STAGE);
    commit_copies();
  }
  // Nothing that another kernel wrote is read, and nothing written, above this line. The kernel behind starts after it:
  // when that one runs, all but this one has ended.
  grid_dependency_wait();
  grid_launch_dependents();
#pragma unroll
  for (int i = 0; i < DEPTH; ++i) {
    if (i < stages) lane.ask_x(p, lane.column + i * STRIDE, ring + i * STAGE);
    commit_copies();
  }
  Behind behind;
  behind.load(p, share);

  Sums mine;
  for (int i = 0, slot = 0; i < stages; ++i) {
    uint4* const stage = ring + slot * STAGE;
    wait_copies<DEPTH - 1>();
    __syncwarp();
    mine.add(p, stage);
    __syncwarp();
    if (i + DEPTH < stages) {
      lane.ask_weights(lane.column + (i + DEPTH) * STRIDE, stage);
      lane.ask_x(p, lane.column + (i + DEPTH) * STRIDE, stage);
    }
    commit_copies();
    if (++slot == DEPTH) slot = 0;
  }
  __syncthreads();
  float* const sums = reinterpret_cast<float*>(dynamic);
  mine.store(p, sums + warp * p.tokens * PITCH, squares[warp]);
  __syncthreads();
  behind.store(p, share, sums, squares);
}
