// out = behind(norm(x) weightᵀ + bias) for up to 8 tokens, every weight read once, in one launch.
//
// The time is the weights' bytes over the memory's bandwidth (docs/math.md, eq. 8); all else must hide behind it.
//
//   1. share    the outputs are dealt to one block an SM, evenly to a row: no tail
//   2. fetch    two warps keep `stages` tiles of 16 rows x CHUNK columns on their way into a ring, a third the same
//               columns of x. Weights depend on nothing: they are asked for before the kernel ahead has ended
//   3. multiply a tile is mma.sync's A operand, the tokens are its 8 columns. At 4.53 TB/s an SM gets 16 bytes for each
//               lane of a warp in 26 cycles, 104 issue slots: CUDA cores would take 8 T + 9 of them at T tokens, 73 for
//               8 of them; tensor cores take 8 for any number
//   4. finish   the warps, each with its columns, add up; bias, SwiGLU, residual
//
// Of 32 columns a lane takes the eight from lane % 4 * 8 on, of both operands: a product does not mind in which order its
// terms are added, and 16 bytes are one load. PAD bytes behind each row of a tile keep such loads apart in the banks.
//
// Defines: scalar_t, SWIGLU, CHUNK (columns of a stage), WARPS (that multiply), FETCHERS (warps that fetch weights),
// TILES (of one pass over x), PAD.
#include "bulk_copy.cuh"
#include "grid_dependency.cuh"
#include "mma.cuh"

constexpr int ROWS = 16, TOKENS = 8;  // of a product
constexpr int MULTIPLIERS = 32 * WARPS, THREADS = MULTIPLIERS + 32 * FETCHERS + 32;
constexpr int WARP_COLUMNS = CHUNK / WARPS, STEPS = WARP_COLUMNS / 32;
constexpr int PITCH = CHUNK * 2 + PAD, TILE_BYTES = ROWS * PITCH;
constexpr int UNITS = SWIGLU ? ROWS / 2 : ROWS;  // a tile's: a unit is an output's one row, or its gate's and its up's
constexpr int PASS_UNITS = TILES * UNITS, PASS_ROWS = TILES * ROWS;
constexpr int SUM_PITCH = PASS_ROWS + 4;  // floats: the four token pairs of a quad meet different banks
constexpr int MOST_STAGES = 16, MOST_SLOTS = 4;
static_assert(WARP_COLUMNS % 32 == 0 && MULTIPLIERS % PASS_UNITS == 0);

struct Params {
  const scalar_t *x, *weight, *bias, *norm;  // [tokens, inputs], [outputs, inputs], [outputs] or null, [inputs] or null
  scalar_t* out;                             // [tokens, units]
  int tokens, inputs, outputs;
  int each, more;     // units of a block, and how many blocks have one more
  int residual;       // whether out holds what the result is added to
  int stages, slots;  // of the weights' ring and of x's
  int ahead;          // stages behind the ring that are brought into L2 at the start
  int trigger;        // stages left to multiply when the kernel behind may start
  float norm_eps;
};

struct Shared {
  Barrier full[MOST_STAGES], empty[MOST_STAGES], x_full[MOST_SLOTS], x_empty[MOST_SLOTS];
  float squares[WARPS][TOKENS];
};

// Where one side of a ring stands. A producer waits for the empty barriers' other parity.
struct Turn {
  int slot = 0;
  u32 parity = 0;

  __device__ __forceinline__ void advance(int slots) {
    if (++slot == slots) slot = 0, parity ^= 1;
  }
};

// A block's stages in order: its share in even passes, a pass in chunks of columns, a chunk in even tiles.
struct Walk {
  int inputs, end;
  int first, count;      // units of this pass
  int tiles, tile_most;  // of this pass, and the units of one
  int column, tile;

  __device__ __forceinline__ explicit Walk(const Params& p) : inputs(p.inputs) {
    const int block = blockIdx.x;
    first = block * p.each + min(block, p.more), end = first + p.each + (block < p.more);
    open();
  }
  __device__ __forceinline__ bool more() const { return first < end; }
  __device__ __forceinline__ int tile_first() const { return first + tile * tile_most; }
  __device__ __forceinline__ int tile_units() const { return min(tile_most, count - tile * tile_most); }
  __device__ __forceinline__ int bytes() const { return min(CHUNK, inputs - column) * 2; }  // of a row

  __device__ __forceinline__ void next_tile() {
    if (++tile == tiles) next_chunk();
  }
  __device__ __forceinline__ void next_chunk() {
    tile = 0;
    if ((column += CHUNK) >= inputs) next_pass();
  }
  __device__ __forceinline__ void next_pass() { first += count, open(); }
  __device__ __forceinline__ int stages() const {  // of the block, from here on
    int n = 0;
    for (Walk walk = *this; walk.more(); walk.next_pass()) n += walk.tiles * ceil_div(inputs, CHUNK);
    return n;
  }

 private:
  __device__ __forceinline__ void open() {
    const int left = end - first;
    count = ceil_div(left, max(1, ceil_div(left, PASS_UNITS)));
    tiles = ceil_div(count, UNITS), tile_most = ceil_div(count, max(1, tiles));
    column = tile = 0;
  }
};

// FETCHERS warps: the weights' tiles into their ring, a lane a row. Reads nothing that another kernel writes. A copy
// takes its addresses in uniform registers, lane after lane, ten instructions each; memory leaves 53 cycles for 1 KiB.
__device__ __forceinline__ void fetch_weights(const Params& p, Shared& shared, u8* ring, int fetcher) {
  const int lane = threadIdx.x % 32, row = fetcher * (ROWS / FETCHERS) + lane, unit = row % UNITS;
  const i64 half = row / UNITS * (p.outputs / 2);  // up's rows stand behind all of the gates'
  const auto mine = [&](const Walk& walk) { return lane < ROWS / FETCHERS && unit < walk.tile_units(); };
  const auto from = [&](const Walk& walk) {
    return p.weight + (half + walk.tile_first() + unit) * p.inputs + walk.column;
  };

  Turn turn;
  int issued = 0;
  for (Walk walk(p); walk.more(); walk.next_tile()) {
    if (issued++ == p.stages) {
      Walk later = walk;
      for (int i = 0; i < p.ahead && later.more(); ++i, later.next_tile())
        if (mine(later)) prefetch_bulk(from(later), later.bytes());
    }
    shared.empty[turn.slot].wait(turn.parity ^ 1);
    const int rows = __popc(__ballot_sync(~0u, mine(walk)));
    if (lane == 0) shared.full[turn.slot].arrive_expecting(rows * walk.bytes());
    __syncwarp();
    if (mine(walk))
      bulk_copy(ring + turn.slot * TILE_BYTES + row * PITCH, from(walk), walk.bytes(), shared.full[turn.slot]);
    turn.advance(p.stages);
  }
}

// One warp: x's chunks into theirs, a lane a token, the norm's weight behind the last of them.
__device__ __forceinline__ void fetch_x(const Params& p, Shared& shared, u8* slots) {
  const int row = threadIdx.x % 32, rows = p.tokens + (p.norm ? 1 : 0);
  const scalar_t* const from = row < p.tokens ? p.x + i64(row) * p.inputs : p.norm;
  grid_dependency_wait();
  Turn turn;
  for (Walk walk(p); walk.more(); walk.next_chunk()) {
    shared.x_empty[turn.slot].wait(turn.parity ^ 1);
    if (row == 0) shared.x_full[turn.slot].arrive_expecting(rows * walk.bytes());
    __syncwarp();
    if (row < rows)
      bulk_copy(slots + (turn.slot * rows + row) * PITCH, from + walk.column, walk.bytes(), shared.x_full[turn.slot]);
    turn.advance(p.slots);
  }
}

__device__ __forceinline__ uint4 load_words(const u8* at, bool valid) {
  return valid ? *reinterpret_cast<const uint4*>(at) : make_uint4(0, 0, 0, 0);
}

// 1 / rms of token lane / 4, over all columns. Lanes of tokens that are not there help with those that are.
__device__ __forceinline__ float inverse_rms(const Params& p, Shared& shared) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int span = 1;  // tokens, rounded up to a power of 2
  while (span < p.tokens) span *= 2;
  const int token = lane / 4 % span, part = lane / 4 / span, parts = TOKENS / span;
  float sum = 0.f;
  if (token < p.tokens) {
    constexpr int BATCH = 8;  // loads in flight
    const scalar_t* const row = p.x + i64(token) * p.inputs;
    const int stride = WARPS * parts * 32;
    for (int first = ((warp * parts + part) * 4 + lane % 4) * 8; first < p.inputs; first += BATCH * stride) {
      uint4 raw[BATCH];
#pragma unroll
      for (int i = 0; i < BATCH; ++i)
        if (first + i * stride < p.inputs) raw[i] = *reinterpret_cast<const uint4*>(row + first + i * stride);
#pragma unroll
      for (int i = 0; i < BATCH; ++i) {
        if (first + i * stride >= p.inputs) break;
        float x[8];
        to_floats(raw[i], x, scalar_t{});
#pragma unroll
        for (int e = 0; e < 8; ++e) sum += x[e] * x[e];
      }
    }
  }
  sum += __shfl_xor_sync(~0u, sum, 1);
  sum += __shfl_xor_sync(~0u, sum, 2);
  for (int step = 4 * span; step < 32; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
  if (lane % 4 == 0 && part == 0) shared.squares[warp][token] = sum;
  named_sync<MULTIPLIERS>(1);
  float total = 0.f;
#pragma unroll
  for (int from = 0; from < WARPS; ++from) total += shared.squares[from][lane / 4 % span];
  return rsqrtf(total / float(p.inputs) + p.norm_eps);
}

// Eight columns of x, normed: rounded once, as a norm of its own would.
__device__ __forceinline__ uint4 normed(uint4 raw, uint4 norm, float factor) {
  float x[8], g[8];
  to_floats(raw, x, scalar_t{});
  to_floats(norm, g, scalar_t{});
#pragma unroll
  for (int e = 0; e < 8; ++e) x[e] *= factor * g[e];
  return make_uint4(pack<scalar_t>(x[0], x[1]), pack<scalar_t>(x[2], x[3]), pack<scalar_t>(x[4], x[5]),
                    pack<scalar_t>(x[6], x[7]));
}

// sums [16 rows x 8 tokens] += a tile's columns of this warp times x's.
__device__ __forceinline__ void multiply_tile(float (&sums)[4], const u8* tile, const uint4 (&x)[STEPS], int columns) {
  const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * WARP_COLUMNS + lane % 4 * 8;
  const u8* const upper = tile + lane / 4 * PITCH + first * 2;
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    const bool inside = first + step * 32 < columns;
    const uint4 a = load_words(upper + step * 64, inside);
    const uint4 b = load_words(upper + step * 64 + 8 * PITCH, inside);
    mma_16x8x16<scalar_t>(sums, {a.x, b.x, a.y, b.y}, x[step].x, x[step].y);
    mma_16x8x16<scalar_t>(sums, {a.z, b.z, a.w, b.w}, x[step].z, x[step].w);
  }
}

// What stands behind a pass's products. A thread has one unit of it, and every (MULTIPLIERS / PASS_UNITS)th token.
struct Behind {
  static constexpr int STRIDE = MULTIPLIERS / PASS_UNITS, ITEMS = TOKENS / STRIDE;

  const int unit = threadIdx.x % PASS_UNITS, token = threadIdx.x / PASS_UNITS;
  scalar_t residual[ITEMS], bias[2];

  __device__ __forceinline__ scalar_t* out(const Params& p, const Walk& pass, int item) const {
    return p.out + i64(token + item * STRIDE) * (SWIGLU ? p.outputs / 2 : p.outputs) + pass.first + unit;
  }
  __device__ __forceinline__ bool present(const Params& p, const Walk& pass, int item) const {
    return unit < pass.count && token + item * STRIDE < p.tokens;
  }

  // Ask early for what is added late.
  __device__ __forceinline__ void load(const Params& p, const Walk& pass) {
    if (p.bias && unit < pass.count) {
      bias[0] = p.bias[pass.first + unit];
      if (SWIGLU) bias[1] = p.bias[p.outputs / 2 + pass.first + unit];
    }
#pragma unroll
    for (int item = 0; item < ITEMS; ++item)
      if (p.residual && present(p, pass, item)) residual[item] = *out(p, pass, item);
  }

  // `sums` [WARPS][TOKENS][SUM_PITCH]: of each unit, and with SwiGLU of the ups from PASS_UNITS on.
  __device__ __forceinline__ void store(const Params& p, const Walk& pass, const float* sums) const {
#pragma unroll
    for (int item = 0; item < ITEMS; ++item) {
      if (!present(p, pass, item)) continue;
      float total[2] = {};
#pragma unroll
      for (int half = 0; half < ROWS / UNITS; ++half) {
#pragma unroll
        for (int warp = 0; warp < WARPS; ++warp)
          total[half] += sums[(warp * p.tokens + token + item * STRIDE) * SUM_PITCH + half * PASS_UNITS + unit];
        if (p.bias) total[half] += to_float(bias[half]);
      }
      float y = total[0];
      if (SWIGLU) y *= fast_reciprocal(1.f + fast_exp2(-LOG2E * y)) * total[1];
      if (p.residual) y += to_float(residual[item]);
      *out(p, pass, item) = from_float<scalar_t>(y);
    }
  }
};

// This warp's part of a pass's sums into shared memory.
__device__ __forceinline__ void share_sums(const float (&sums)[TILES][4], const Walk& pass, int tokens, float* shared) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = lane % 4 * 2 + i % 2, unit = lane / 4 + (SWIGLU ? 0 : i / 2 * 8);
      const int at = tile * pass.tile_most + unit;  // in the pass
      if (token < tokens && unit < pass.tile_most && at < pass.count)
        shared[(warp * tokens + token) * SUM_PITCH + (SWIGLU ? i / 2 * PASS_UNITS : 0) + at] = sums[tile][i];
    }
}

// The warps that multiply: each takes its WARP_COLUMNS of every chunk.
__device__ __forceinline__ void multiply_all(const Params& p, Shared& shared, const u8* ring, const u8* slots,
                                             float* shared_sums) {
  const int lane = threadIdx.x % 32, token = lane / 4;
  const int first_column = threadIdx.x / 32 * WARP_COLUMNS + lane % 4 * 8, x_rows = p.tokens + (p.norm ? 1 : 0);
  // Nothing that another kernel wrote is read, and nothing written, above this line. The kernel behind starts after it:
  // when that one runs, all but this one has ended.
  grid_dependency_wait();
  const float factor = p.norm ? inverse_rms(p, shared) : 1.f;

  Turn turn, x_turn;
  Walk pass(p);
  int left = pass.stages();
  const int trigger = min(left, p.trigger);
  if (trigger == left) grid_launch_dependents();
  for (; pass.more(); pass.next_pass()) {
    Behind behind;
    behind.load(p, pass);
    float sums[TILES][4] = {};
    for (int column = 0; column < p.inputs; column += CHUNK) {
      const int columns = p.inputs - column;
      uint4 x[STEPS];
      shared.x_full[x_turn.slot].wait(x_turn.parity);
      const u8* const slot = slots + x_turn.slot * x_rows * PITCH;
#pragma unroll
      for (int step = 0; step < STEPS; ++step) {
        const int at = first_column + step * 32;
        x[step] = load_words(slot + token * PITCH + at * 2, token < p.tokens && at < columns);
        if (p.norm) x[step] = normed(x[step], load_words(slot + p.tokens * PITCH + at * 2, at < columns), factor);
      }
      __syncwarp();
      if (lane == 0) shared.x_empty[x_turn.slot].arrive();
      x_turn.advance(p.slots);

#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) {
        if (tile >= pass.tiles) break;
        shared.full[turn.slot].wait(turn.parity);
        multiply_tile(sums[tile], ring + turn.slot * TILE_BYTES, x, columns);
        __syncwarp();
        if (lane == 0) shared.empty[turn.slot].arrive();
        turn.advance(p.stages);
        if (--left == trigger) grid_launch_dependents();
      }
    }
    share_sums(sums, pass, p.tokens, shared_sums);
    named_sync<MULTIPLIERS>(1);
    behind.store(p, pass, shared_sums);
    named_sync<MULTIPLIERS>(1);
  }
}

// grid: up to one block a unit. Dynamic shared memory: the weights' ring, x's slots, the sums.
extern "C" __global__ void __launch_bounds__(THREADS, 2) project(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) u8 dynamic[];
  __shared__ Shared shared;
  u8* const slots = dynamic + p.stages * TILE_BYTES;
  float* const sums = reinterpret_cast<float*>(slots + p.slots * (p.tokens + (p.norm ? 1 : 0)) * PITCH);
  if (threadIdx.x == 0) {
    for (int i = 0; i < p.stages; ++i) shared.full[i].init(FETCHERS), shared.empty[i].init(WARPS);
    for (int i = 0; i < p.slots; ++i) shared.x_full[i].init(1), shared.x_empty[i].init(WARPS);
    fence_barrier_init();
  }
  __syncthreads();
  const int warp = threadIdx.x / 32;
  if (warp < WARPS) multiply_all(p, shared, dynamic, slots, sums);
  else if (warp < WARPS + FETCHERS) fetch_weights(p, shared, dynamic, warp - WARPS);
  else fetch_x(p, shared, slots);
}
