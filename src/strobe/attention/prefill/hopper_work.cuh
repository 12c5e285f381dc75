// What the warps of a block share: the kernel's parameter, the tile of queries that they work on, and the barriers
// through which the producer and the consumers hand each other q, keys, values and works.
//
// Defines: as cuda_hopper.cu.
#pragma once

#include "barrier.cuh"
#include "mask.cuh"
#include "matrix_descriptor.cuh"
#include "ring.cuh"
#include "tile_order.cuh"

constexpr int ROWS = 64;  // queries of a consumer
constexpr int Q_TILE = CONSUMERS * ROWS;
constexpr int THREADS = (CONSUMERS + 1) * 128;
constexpr int STAGES = 2;  // of keys and of values
constexpr int WORKS = 3;   // at a time: the consumers' current and coming one, and the producer's
constexpr int PANEL = HEAD_DIM % 64 ? 32 : 64;  // columns side by side in shared memory: what a swizzle spans
constexpr int PANELS = HEAD_DIM / PANEL;
constexpr Swizzle SWIZZLE = PANEL == 64 ? Swizzle::B128 : Swizzle::B64;
constexpr u32 Q_BYTES = ROWS * HEAD_DIM * 2, Q_PANEL_BYTES = ROWS * PANEL * 2;
constexpr u32 KV_BYTES = K_TILE * HEAD_DIM * 2, KV_PANEL_BYTES = K_TILE * PANEL * 2;
constexpr bool PAGED = PAGE_SIZE > 0;
constexpr int PAGE = PAGED ? PAGE_SIZE : K_TILE;
constexpr int PAGE_ROWS = PAGE < K_TILE ? PAGE : K_TILE;  // keys of one copy
constexpr int V_ROWS = PAGE_ROWS % 16 ? K_TILE : PAGE_ROWS;  // keys whose values, all panels, stand together
constexpr bool FOREIGN_ROWS = PACKED_KV || PAGED;  // past a row's last key stand others, not the tensor's end
constexpr int PRODUCER_REGISTERS = CONSUMERS == 3 ? 32 : FOLDED ? 24 : 40;
constexpr int CONSUMER_REGISTERS = CONSUMERS == 3 ? 160 : FOLDED ? 240 : 232;
// Key tiles are taken from the first to the last where queries end them: what must be masked does not come on top of a
// work's first maxima and the stores of the work before. At head_dim 128 that gains up to 1k keys, and is level or 1 to
// 3 % slower from 4k on.
constexpr bool ASCENDING = HAS_RIGHT && !FOLDED && (HEAD_DIM != 128 || BULK_STORE);
constexpr int NEXT = ASCENDING ? 1 : -1;
constexpr bool OWN_KEYS = FOLDED || (ASCENDING && K_TILE <= ROWS);  // a consumer leaves out tiles that it does not see
constexpr bool OVERLAP = CONSUMERS < 3;  // a softmax also runs under its own consumer's products: takes more registers
// Two consumers that store in bulk work on rows of few key tiles. What a consumer does when it changes works is not
// hidden, since the other one does the same then: there it does less, by more code.
constexpr bool SHORT_WORKS = BULK_STORE && OVERLAP;
// Steps come in pairs: the second one's products read weights where the first has left them, and none are moved. At
// head_dim 192 and 256 there are no registers for both.
constexpr bool PAIRS = OVERLAP && HEAD_DIM <= 128;
// With a third tile of q it is early enough to give q back after a work's last step: no step asks if it is that one.
constexpr bool LATE_Q = BULK_STORE && Q_STAGES > 2;
template <class T>
constexpr bool WIDE_RANGE = false;
template <>
constexpr bool WIDE_RANGE<bf16> = true;
// A work's first weights are taken against 0, and against maxima where their sum is far from 1. f16 has no range for
// that; and of a diagonal that comes first some threads see nothing, so they could not tell.
constexpr bool FROM_ZERO = SHORT_WORKS && WIDE_RANGE<scalar_t> && (ASCENDING || !HAS_RIGHT);

static_assert(!BULK_STORE || (Q_STAGES > 1 && CONSUMERS > 1 && !PACKED_Q),
              "results wait where q was; a row's end is the tensor's");
static_assert(!FOLDED || (CONSUMERS == 2 && HAS_RIGHT && !HAS_LEFT && !KEYLESS && !PACKED_Q),
              "both consumers' keys begin at 0, and the second one's end last");
static_assert(!OWN_KEYS || FOLDED || (CONSUMERS - 1) * ROWS <= STAGES * K_TILE,
              "keys are passed over before the values ahead of them are free");
static_assert(KEYLESS || (!PACKED_Q && !FOREIGN_ROWS), "lengths that only the device knows may be 0");

__device__ __forceinline__ int first_of(const KeyTiles& keys) { return ASCENDING ? keys.begin : keys.end - 1; }
__device__ __forceinline__ int last_of(const KeyTiles& keys) { return ASCENDING ? keys.end - 1 : keys.begin; }

// A consumer's bounds while it goes through them: in registers, or in shared memory where registers are short.
template <bool>
struct BoundsIn {
  using Type = const KeyTiles&;
};
template <>
struct BoundsIn<true> {
  using Type = KeyTiles;
};
using Bounds = BoundsIn<SHORT_WORKS>::Type;

struct Work;

struct Params {
  scalar_t* out;
  float* lse;
  const float* sinks;
  const int *cu_seqlens_q, *cu_seqlens_kv, *seq_lens, *page_table;
  int* next_tile;  // 0 before and after each launch
  i64 out_batch_stride, out_row_stride, out_head_stride, lse_batch_stride, lse_head_stride;
  TileOrder order;
  int q_heads, group, q_len, kv_len, pages_per_row;
  int left, right;
  int zero;
  float scale_log2;     // from scores, or their tanh where there is a softcap, to exponents of 2
  float softcap_scale;  // scale / softcap

  __device__ __forceinline__ scalar_t* out_row(const Work& work, int token) const;
  __device__ __forceinline__ void store_lse(const Work& work, int token, float value) const;
};

// A tile of queries of one head and the keys that it sees. head -1: there are no more.
struct Work {
  static constexpr int PARTS = OWN_KEYS ? CONSUMERS : 1;

  int batch, head;
  int q_start, q_len, kv_start, kv_len;  // of the batch row; starts are 0 where rows are not packed
  int q_first[PARTS];
  KeyTiles keys[PARTS];

  __device__ __forceinline__ int q_first_of(int consumer) const {
    return OWN_KEYS ? q_first[consumer] : q_first[0] + consumer * ROWS;
  }
  __device__ __forceinline__ const KeyTiles& keys_of(int consumer) const { return keys[OWN_KEYS ? consumer : 0]; }
  __device__ __forceinline__ const KeyTiles& all_keys() const { return keys[PARTS - 1]; }
  // Key tiles that only other consumers see.
  __device__ __forceinline__ int unseen_by(int consumer) const { return all_keys().end - keys_of(consumer).end; }
  __device__ __forceinline__ bool sees_keys() const { return all_keys().begin < all_keys().end; }
  __device__ __forceinline__ WindowMask<HAS_LEFT, HAS_RIGHT> mask(const Params& p) const {
    return {kv_len, kv_len - q_len, p.left, p.right};
  }
};

__device__ __forceinline__ scalar_t* Params::out_row(const Work& work, int token) const {
  const i64 batch = PACKED_Q ? 0 : work.batch * out_batch_stride;
  return out + batch + (work.q_start + token) * out_row_stride + work.head * out_head_stride;
}
__device__ __forceinline__ void Params::store_lse(const Work& work, int token, float value) const {
  const i64 batch = PACKED_Q ? 0 : work.batch * lse_batch_stride;
  if (lse && token < work.q_len) lse[batch + work.head * lse_head_stride + work.q_start + token] = value;
}

struct Shared {
  scalar_t q[Q_STAGES][CONSUMERS][ROWS * HEAD_DIM];
  scalar_t k[STAGES][K_TILE * HEAD_DIM];
  scalar_t v[STAGES][K_TILE * HEAD_DIM];
  Barrier q_full[Q_STAGES][CONSUMERS], q_empty[Q_STAGES][CONSUMERS];
  Barrier k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES];
  Barrier work_full[WORKS], work_empty[WORKS];
  Barrier begun;  // what the first work begins with is there
  Work work[WORKS];

  __device__ __forceinline__ void init() {
    for (int i = 0; i < Q_STAGES; ++i)
      for (int c = 0; c < CONSUMERS; ++c) q_full[i][c].init(1), q_empty[i][c].init(BULK_STORE ? 1 : 4);
    for (int i = 0; i < STAGES; ++i) {
      k_full[i].init(1), k_empty[i].init(4 * CONSUMERS);
      v_full[i].init(1), v_empty[i].init(4 * CONSUMERS);
    }
    // a work is done with when the consumers are, and the producer of values has read it
    for (int i = 0; i < WORKS; ++i) work_full[i].init(1), work_empty[i].init(4 * CONSUMERS + 1);
    begun.init(1);
    fence_barrier_init();
  }
};
