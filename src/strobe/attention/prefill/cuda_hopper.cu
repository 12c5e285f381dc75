// FlashAttention forward for Hopper (docs/math.md). A block stays on its SM and draws tiles of queries, CONSUMERS x 64
// of one head at a time. One producer warp keeps the copy engine busy; each consumer warpgroup owns 64 of the queries
// and holds their scores, weights and output in registers. What makes it fast, in the order of what it gained:
//
//   - turns: only one consumer at a time issues matrix products, so that one's softmax runs under another's products;
//   - a softmax that does not look for the maximum: weights are taken against an old one, and their sum tells whether
//     that was near enough (it nearly always is); no comparisons, no shuffles, no rescaling of the output;
//   - no gap between tiles: the next tile's first scores are issued with this tile's last output, and stored under;
//   - longest tiles first, drawn late, heads in sections that fit L2;
//   - the first tile is worked out while the kernel ahead still runs, and its q and keys go ahead of all else.
//
// Measured and dropped (docs/log.md): exp2 by polynomial, q in registers, key tiles above 128, four consumers, eviction
// hints, a third stage, pairs of blocks that share keys, half diagonal tiles, stores under a tile's second scores.
//
// Defines: scalar_t (bf16, f16), HEAD_DIM, K_TILE (keys at a time), CONSUMERS, Q_STAGES, HAS_LEFT and HAS_RIGHT
// (window limits), KEYLESS (a tile of queries may see no key), SOFTCAP, SINKS, PACKED_Q, PACKED_KV, PAGE_SIZE (0: not
// paged), BULK_STORE (results leave through shared memory and the copy engine), FOLDED (few causal tiles: a block works
// on one alone, and of a head's queries its consumers take 64 from the front and 64 from the back).
#include "barrier.cuh"
#include "grid_dependency.cuh"
#include "mask.cuh"
#include "mma.cuh"
#include "tile_order.cuh"
#include "tma.cuh"
#include "types.cuh"
#include "wgmma.cuh"

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
constexpr int V_ROWS = PAGE_ROWS % 16 ? K_TILE : PAGE_ROWS;  // values of so many keys, all panels, are one after the other
constexpr bool FOREIGN_ROWS = PACKED_KV || PAGED;  // past a row's last key stand others, not the tensor's end
constexpr int PRODUCER_REGISTERS = CONSUMERS == 3 ? 32 : FOLDED ? 24 : 40;
constexpr int CONSUMER_REGISTERS = CONSUMERS == 3 ? 160 : FOLDED ? 240 : 232;
constexpr bool OVERLAP = CONSUMERS < 3;  // a softmax also runs under its own consumer's products: takes more registers

static_assert(!BULK_STORE || (Q_STAGES > 1 && CONSUMERS > 1 && !PACKED_Q),
              "results wait where q was; a row's end is the tensor's");
static_assert(!FOLDED || (CONSUMERS == 2 && HAS_RIGHT && !HAS_LEFT && !KEYLESS && !PACKED_Q),
              "both consumers' keys begin at 0, and the second one's end last");
static_assert(KEYLESS || (!PACKED_Q && !FOREIGN_ROWS), "lengths that only the device knows may be 0");

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
  static constexpr int PARTS = FOLDED ? CONSUMERS : 1;

  int batch, head;
  int q_start, q_len, kv_start, kv_len;  // of the batch row; starts are 0 where rows are not packed
  int q_first[PARTS];
  KeyTiles keys[PARTS];

  __device__ __forceinline__ int q_first_of(int consumer) const {
    return FOLDED ? q_first[consumer] : q_first[0] + consumer * ROWS;
  }
  __device__ __forceinline__ const KeyTiles& keys_of(int consumer) const { return keys[FOLDED ? consumer : 0]; }
  __device__ __forceinline__ const KeyTiles& all_keys() const { return keys[PARTS - 1]; }
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
  Work work[WORKS];

  __device__ __forceinline__ void init() {
    for (int i = 0; i < Q_STAGES; ++i)
      for (int c = 0; c < CONSUMERS; ++c) q_full[i][c].init(1), q_empty[i][c].init(BULK_STORE ? 1 : 4);
    for (int i = 0; i < STAGES; ++i) {
      k_full[i].init(1), k_empty[i].init(4 * CONSUMERS);
      v_full[i].init(1), v_empty[i].init(4 * CONSUMERS);
    }
    for (int i = 0; i < WORKS; ++i) work_full[i].init(1), work_empty[i].init(4 * CONSUMERS);
    fence_barrier_init();
  }
};

// --- the producer: one warp -------------------------------------------------------------------------

// Loads everything in the order in which the consumers use it: a key tile's scores are due before the output of the
// key tile ahead of it, also from one tile of queries to the next.
struct Producer {
  const Params& p;
  Shared& s;
  const TensorMap &q, &k, &v;
  const int lane = threadIdx.x % 32;
  Ring<STAGES> k_ring, v_ring;
  Ring<Q_STAGES> q_ring;
  Ring<WORKS> work_ring;

  struct KeyRows {
    int kv_head, batch, start, len;
  };
  KeyRows due_rows;
  bool begun = false;  // what the first work begins with goes ahead of what it needs later
  int due_tile = -1, due_page;  // of the values that are still to be loaded

  __device__ __forceinline__ Work work_at(TileOrder::Tile tile) const {
    const auto [head, q_tile] = tile;
    Work work = {head / p.q_heads, head % p.q_heads, 0, p.q_len, 0, p.kv_len};
    if (PACKED_Q) {
      work.q_start = p.cu_seqlens_q[work.batch];
      work.q_len = p.cu_seqlens_q[work.batch + 1] - work.q_start;
    }
    if (PACKED_KV) {
      work.kv_start = p.cu_seqlens_kv[work.batch];
      work.kv_len = p.cu_seqlens_kv[work.batch + 1] - work.kv_start;
    }
    if (PAGED) work.kv_len = p.seq_lens[work.batch];
#pragma unroll
    for (int part = 0; part < Work::PARTS; ++part) {
      const int mirrored = part ? 2 * p.order.q_tiles - 1 - q_tile : q_tile;
      const int first = FOLDED ? mirrored * ROWS : q_tile * Q_TILE;
      const int last = min(first + Q_TILE / Work::PARTS, work.q_len) - 1;
      work.q_first[part] = first;
      work.keys[part] = KeyTiles::of<K_TILE>(work.mask(p), first, last);
      if (KEYLESS && first > last) work.keys[part].end = work.keys[part].begin;
    }
    return work;
  }

  __device__ __forceinline__ void publish(const Work& work) {
    s.work_empty[work_ring.stage].wait(work_ring.parity ^ 1);
    if (lane == 0) {
      s.work[work_ring.stage] = work;
      s.work_full[work_ring.stage].arrive();
    }
    work_ring.advance();
  }

  // What queries that see no key get. Consumers hear of works with keys alone: they hold one until they have the next.
  __device__ __forceinline__ void store_nothing(const Work& work) {
    constexpr int CHUNKS = HEAD_DIM / 8;
    const int first = work.q_first_of(0), rows = min(Q_TILE, work.q_len - first);
    for (int i = lane; i < rows * CHUNKS; i += 32) {
      scalar_t* const row = p.out_row(work, first + i / CHUNKS);
      reinterpret_cast<uint4*>(row)[i % CHUNKS] = make_uint4(0, 0, 0, 0);
    }
    for (int i = lane; i < rows; i += 32) p.store_lse(work, first + i, SINKS ? p.sinks[work.head] : NEG_INF);
  }

  __device__ __forceinline__ void load_q(const Work& work, int c) {
    Barrier& full = s.q_full[q_ring.stage][c];
    s.q_empty[q_ring.stage][c].wait(q_ring.parity ^ 1);
    if (lane == 0) {
      full.arrive_expecting(Q_BYTES);
      const int row = work.q_start + work.q_first_of(c);
      tma_load(s.q[q_ring.stage][c], q, full, 0, row, 0, work.head, PACKED_Q ? 0 : work.batch);
    }
  }

  __device__ __forceinline__ void load_k(const KeyRows& rows, int n, int page) {
    s.k_empty[k_ring.stage].wait(k_ring.parity ^ 1);
    load_keys<K_TILE>(s.k[k_ring.stage], k, s.k_full[k_ring.stage], rows, n, page);
    k_ring.advance();
  }

  __device__ __forceinline__ void load_due_v() {
    if (due_tile < 0) return;
    s.v_empty[v_ring.stage].wait(v_ring.parity ^ 1);
    load_keys<V_ROWS>(s.v[v_ring.stage], v, s.v_full[v_ring.stage], due_rows, due_tile, due_page);
    v_ring.advance();
  }

  // PAGED: where this lane's keys of key tile n stand, if it has any. Asked for early: it takes as long as the copy.
  __device__ __forceinline__ int page_of(const KeyRows& rows, int n) const {
    const int key = n * K_TILE + lane * PAGE_ROWS;
    if (!PAGED || lane >= K_TILE / PAGE_ROWS || key < 0 || key >= rows.len) return -1;
    return p.page_table[i64(rows.batch) * p.pages_per_row + key / PAGE];
  }

  // Key tile n: in one copy, or page by page, panels of TOGETHER rows side by side. Pages past the row's length are not
  // touched. One lane for all: the copies of lanes that differ would be issued in a loop that asks for the next lane.
  template <int TOGETHER>
  __device__ __forceinline__ void load_keys(scalar_t* tile, const TensorMap& map, Barrier& full, const KeyRows& rows,
                                            int n, int page) {
    if constexpr (!PAGED) {
      if (lane == 0) {
        full.arrive_expecting(KV_BYTES);
        tma_load(tile, map, full, 0, rows.start + n * K_TILE, 0, rows.kv_head, PACKED_KV ? 0 : rows.batch);
      }
    } else {
      const int first = n * K_TILE;
      const int pages = min(K_TILE / PAGE_ROWS, ceil_div(rows.len - first, PAGE_ROWS));
      if (lane == 0) full.arrive_expecting(pages * PAGE_ROWS * HEAD_DIM * 2);
      __syncwarp();
#pragma unroll
      for (int i = 0; i < K_TILE / PAGE_ROWS; ++i) {
        const int at = __shfl_sync(~0u, page, i);
        if (i < pages && elect_lane()) {
          const int row = (first + i * PAGE_ROWS) % PAGE;
          if constexpr (TOGETHER == PAGE_ROWS) {
            tma_load(tile + i * PAGE_ROWS * HEAD_DIM, map, full, 0, row, 0, rows.kv_head, at);
          } else {
#pragma unroll
            for (int panel = 0; panel < PANELS; ++panel)
              tma_load(tile + (panel * K_TILE + i * PAGE_ROWS) * PANEL, map, full, 0, row, panel, rows.kv_head, at);
          }
        }
      }
      __syncwarp();
    }
  }

  __device__ __forceinline__ int draw() { return lane == 0 ? atomicAdd(p.next_tile, 1) : 0; }

  __device__ __forceinline__ void run() {
    if (KEYLESS) grid_dependency_wait();  // lengths may be the device's, and outputs written without loads
    int drawn = -1;
    if constexpr (FOLDED) {
      load(work_at(p.order.at(blockIdx.x)));
    } else if constexpr (PACKED_Q) {
      PackedTileOrder<Q_TILE> order = {p.cu_seqlens_q, p.order.heads / p.q_heads, p.q_heads};
      for (auto tile = order.at(blockIdx.x); tile.head >= 0; tile = order.at(gridDim.x + drawn))
        drawn = load(work_at(tile));
      leave_counter(drawn, order.before * p.q_heads);
    } else {
      for (int index = blockIdx.x; index < p.order.count(); index = gridDim.x + drawn) {
        drawn = load(work_at(p.order.at(index)));
        leave_counter(drawn, p.order.count());
      }
    }
    load_due_v();
    Work none;
    none.head = -1;
    publish(none);
  }

  // Each tile draws once: who drew last leaves the counter as it was.
  __device__ __forceinline__ void leave_counter(int drawn, int tiles) {
    if (lane == 0 && drawn == tiles - 1) atomicExch(p.next_tile, 0);
  }

  // A work and what it needs, but for its last values; returns what was drawn meanwhile.
  __device__ __forceinline__ int load(const Work& work) {
    if (!KEYLESS || work.sees_keys()) publish(work);
    else store_nothing(work);
    if (!KEYLESS) grid_dependency_wait();  // consumers write what depends on loads alone, so they need not
    const KeyRows rows = {work.head / p.group, work.batch, work.kv_start, work.kv_len};
    const int begin = work.all_keys().begin, last = work.all_keys().end - 1;
    // The next tile is drawn just early enough to hide the latency. Earlier, a block with a long tile would hold back
    // a tile of the head that is in L2 now.
    const int draw_at = min(begin + 2, last);
    int drawn = 0, page = page_of(rows, last);
    if (KEYLESS && !work.sees_keys()) drawn = draw();
    for (int n = last; n >= begin; --n) {
      if (n == last) load_q(work, 0);
      load_k(rows, n, page);
      if (n == last) {
#pragma unroll
        for (int c = 1; c < CONSUMERS; ++c) load_q(work, c);
        q_ring.advance();
        if (!begun) s.q_full[0][CONSUMERS - 1].wait(0), begun = true;
      }
      if (!FOLDED && n == draw_at) drawn = draw();
      load_due_v();
      due_tile = n, due_page = page, due_rows = rows;
      page = page_of(rows, n - 1);
    }
    return __shfl_sync(~0u, drawn, 0);
  }
};

// --- a consumer: one warpgroup ------------------------------------------------------------------------

// Online softmax of a consumer's rows; a thread holds columns of row `lane / 4` of its warp's 16 and of the eighth
// after it. Weights are 2^(score * scale_log2 - shift). out / sum does not depend on the shift, which only has to
// keep the weights within 16 bits; it is -inf while a row has seen no key.
struct Softmax {
  float scale_log2;
  float shift[2], sum[2], factor[2];

  __device__ __forceinline__ explicit Softmax(float scale_log2) : scale_log2(scale_log2) {
#pragma unroll
    for (int half = 0; half < 2; ++half) shift[half] = NEG_INF, sum[half] = 0.f;
  }

  // Weights of the scores, packed; true where the shift was raised, so that out must be scaled by `factor`.
  template <bool FIRST, int N>
  __device__ __forceinline__ bool weigh(const float (&scores)[N], u32 (&weights)[N / 2]) {
    float added[2];
    bool raised = true;
    if (!FIRST) {
      exponentials(scores, weights, shift, added);  // infinite or NaN where the row has seen no key
      raised = __any_sync(~0u, !(added[0] + added[1] < 4096.f));
    }
    if (raised) {
      raise(scores);
      const float finite[2] = {shift[0] == NEG_INF ? 0.f : shift[0], shift[1] == NEG_INF ? 0.f : shift[1]};
      exponentials(scores, weights, finite, added);
    }
    sum[0] += added[0], sum[1] += added[1];
    return raised;
  }

  template <int N>
  __device__ __forceinline__ void exponentials(const float (&scores)[N], u32 (&weights)[N / 2], const float (&from)[2],
                                               float (&added)[2]) {
    added[0] = added[1] = 0.f;
#pragma unroll
    for (int j = 0; j < N; j += 2) {
      const int half = j / 2 % 2;
      const float low = fast_exp2(fmaf(scores[j], scale_log2, -from[half]));
      const float high = fast_exp2(fmaf(scores[j + 1], scale_log2, -from[half]));
      added[half] += low + high;
      weights[j / 2] = pack<scalar_t>(low, high);
    }
  }

  // Raise the shifts to the rows' maxima.
  template <int N>
  __device__ __forceinline__ void raise(const float (&scores)[N]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = fmaxf(scores[2 * half], scores[2 * half + 1]);
#pragma unroll
      for (int j = 4; j < N; j += 4) top = fmaxf(top, fmaxf(scores[j + 2 * half], scores[j + 2 * half + 1]));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
      const float higher = fmaxf(top * scale_log2, shift[half]);
      factor[half] = higher == NEG_INF ? 1.f : fast_exp2(shift[half] - higher);
      shift[half] = higher;
      sum[half] *= factor[half];
    }
  }

  // What out is to be multiplied by, and lse. `sink_log2` is one more exponent in the sum (-inf: none).
  __device__ __forceinline__ void finish(int half, float sink_log2, float& inverse, float& lse) {
    float total = sum[half];
    total += __shfl_xor_sync(~0u, total, 1);
    total += __shfl_xor_sync(~0u, total, 2);
    float scale = 1.f, top = shift[half];
    if (SINKS) {
      top = fmaxf(shift[half], sink_log2);
      scale = top == NEG_INF ? 0.f : fast_exp2(shift[half] - top);
      total = total * scale + (top == NEG_INF ? 0.f : fast_exp2(sink_log2 - top));
    }
    inverse = total == 0.f ? 0.f : scale / total;
    lse = top * LN2 + __logf(total);
  }
};

// To float32 accuracy: the special-function unit's own tanh has 11 bits.
__device__ __forceinline__ float tanh_by_exp2(float x) {
  return 1.f - __fdividef(2.f, fast_exp2(x * (2.f * LOG2E)) + 1.f);
}

// Bytes from a K-major operand's start to its k-th step of 16.
__device__ __forceinline__ constexpr u32 k_major_step(int k, u32 panel_bytes) {
  return k * 16 / PANEL * panel_bytes + k * 16 % PANEL * 2;
}

// BULK_STORE: a consumer's results on their way out.
template <bool>
struct Results {
  static constexpr int q_stage = -1;
  __device__ __forceinline__ Results(const TensorMap&) {}
  __device__ __forceinline__ void leave(const scalar_t*, int, int, int, int) {}
};
template <>
struct Results<true> {
  const TensorMap& map;
  int q_stage = -1;  // whose place in shared memory they take; -1: none have yet

  __device__ __forceinline__ Results(const TensorMap& map) : map(map) {}
  __device__ __forceinline__ void leave(const scalar_t* tile, int stage, int row, int head, int batch) {
    q_stage = stage;
    if (threadIdx.x % 128 == 0) {
      tma_store(map, tile, 0, row, 0, head, batch);
      bulk_commit();
    }
  }
};

struct Consumer : Results<BULK_STORE> {
  const Params& p;
  Shared& s;
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0) - 1;
  Ring<STAGES> k_ring, v_ring;
  Ring<Q_STAGES> q_ring;
  Ring<WORKS> work_ring;

  float scores[K_TILE / 2];
  u32 weights[K_TILE / 4];
  u32 coming_weights[OVERLAP ? K_TILE / 4 : 1];  // while the products still read `weights`
  float out[HEAD_DIM / 2];
  int v_rows;  // of the next values that are the row's own

  __device__ __forceinline__ void run() {
    if (group == CONSUMERS - 1) end_turn();  // the first turn is consumer 0's
    const Work* work = next_work();
    if (!work) return;
    Softmax softmax(p.scale_log2);
    begin(*work, softmax);
    while (true) {
      steps(*work, softmax);
      const Work* coming = FOLDED ? nullptr : next_work();
      if (!coming) break;
      turn_over(*work, softmax, *coming);
      __syncwarp();
      release(s.work_empty[work - s.work]);
      work = coming;
    }
    finish(*work, softmax);
    if (BULK_STORE && threadIdx.x % 128 == 0) bulk_wait_read();
  }

  // Null after the last.
  __device__ __forceinline__ const Work* next_work() {
    const Work& work = s.work[work_ring.stage];
    s.work_full[work_ring.stage].wait(work_ring.parity);
    work_ring.advance();
    return work.head < 0 ? nullptr : &work;
  }

  // A work's first weights, with no output yet.
  __device__ __forceinline__ void begin(const Work& work, Softmax& softmax) {
    if (FOLDED) pass_over(work);
    s.q_full[q_ring.stage][group].wait(q_ring.parity);
    s.k_full[k_ring.stage].wait(k_ring.parity);
    pin(scores);
    issue_scores();
    wgmma_wait<0>();
    scores_done();
    first_weights(work, softmax);
    clear_out();
    take_weights();
    v_rows = work.kv_len - (work.keys_of(group).end - 1) * K_TILE;
  }

  // FOLDED: the key tiles that only the other consumer sees, and their turns.
  __device__ __forceinline__ void pass_over(const Work& work) {
    for (int n = work.all_keys().end; n > work.keys_of(group).end; --n) {
      s.k_full[k_ring.stage].wait(k_ring.parity);
      named_sync<256>(1 + group);
      end_turn();
      release(s.k_empty[k_ring.stage]);
      k_ring.advance();
      s.v_full[v_ring.stage].wait(v_ring.parity);
      __syncwarp();
      release(s.v_empty[v_ring.stage]);
      v_ring.advance();
    }
  }

  // All key tiles after the first, back to front: the masked ones of the diagonal, the full ones, those at the
  // window's left end. The bounds stay in shared memory: registers are short.
  __device__ __forceinline__ void steps(const Work& work, Softmax& softmax) {
    const KeyTiles& keys = work.keys_of(group);
    int n = keys.end - 2;
    if (HAS_RIGHT)
      for (; n >= max(keys.begin, keys.full_end); --n) step<true>(work, softmax, n);
    const int lowest = HAS_LEFT ? keys.full_begin : keys.begin;
    for (; n >= lowest; --n) step<false>(work, softmax, n);
    if (HAS_LEFT)
      for (; n >= keys.begin; --n) step<true>(work, softmax, n);
    if (keys.begin == keys.end - 1) leave_q();
  }

  // The scores of key tile n, and under them the output of key tile n + 1.
  template <bool MASKED>
  __device__ __forceinline__ void step(const Work& work, Softmax& softmax, int n) {
    take_turn();
    if (n == work.keys_of(group).begin) leave_q();
    cap_scores();
    if (MASKED) mask_scores(work, n);
    const bool raised = weigh<false>(softmax);
    wait_for_out();
    if (raised) {
#pragma unroll
      for (int j = 0; j < HEAD_DIM / 2; ++j) out[j] *= softmax.factor[j / 2 % 2];
    }
    take_weights();
    if (BULK_STORE && n == work.keys_of(group).end - 2) free_q();
  }

  // The next work's first scores, and under them the last output of this one.
  __device__ __forceinline__ void turn_over(const Work& work, Softmax& softmax, const Work& coming) {
    if (BULK_STORE && work.keys_of(group).begin == work.keys_of(group).end - 1) free_q();
    s.q_full[q_ring.stage][group].wait(q_ring.parity);
    take_turn();
    if constexpr (!OVERLAP) store(work, softmax);
    Softmax fresh(p.scale_log2);
    first_weights(coming, fresh);
    if constexpr (OVERLAP) {
      wait_for_out();
      store(work, softmax);
    }
    clear_out();
    take_weights();
    v_rows = coming.kv_len - (coming.keys_of(group).end - 1) * K_TILE;
    softmax = fresh;
  }

  __device__ __forceinline__ void finish(const Work& work, Softmax& softmax) {
    pin(out);
    issue_out();
    wgmma_wait<0>();
    out_done();
    if (BULK_STORE) named_sync<128>(1 + CONSUMERS + group);  // all warps are done with q
    store(work, softmax);
  }

  // --- matrix products: scores of the stage at k_ring, output of the stage at v_ring

  __device__ __forceinline__ void take_turn() {
    s.k_full[k_ring.stage].wait(k_ring.parity);
    if (CONSUMERS > 1) named_sync<256>(1 + group);
    pin(scores);
    pin(out);
    issue_scores();
    issue_out();
    end_turn();
    wgmma_wait<OVERLAP ? 1 : 0>();
    scores_done();
    if constexpr (!OVERLAP) out_done();
  }
  __device__ __forceinline__ void end_turn() {
    if (CONSUMERS > 1) named_arrive<256>(1 + (group + 1) % CONSUMERS);
  }

  // scores = q kᵀ
  __device__ __forceinline__ void issue_scores() {
    const u64 a = matrix_descriptor<SWIZZLE>(shared_address(s.q[q_ring.stage][group]), 16);
    const u64 b = matrix_descriptor<SWIZZLE>(shared_address(s.k[k_ring.stage]), 16);
    wgmma_fence();
    Wgmma<scalar_t, K_TILE>::template ss<false>(scores, a, b);
#pragma unroll
    for (int step = 1; step < HEAD_DIM / 16; ++step)
      Wgmma<scalar_t, K_TILE>::template ss<true>(scores, a + (k_major_step(step, Q_PANEL_BYTES) >> 4),
                                                 b + (k_major_step(step, KV_PANEL_BYTES) >> 4));
    wgmma_commit();
  }

  // out += weights v
  __device__ __forceinline__ void issue_out() {
    s.v_full[v_ring.stage].wait(v_ring.parity);
    if (FOREIGN_ROWS && v_rows < K_TILE) clear_foreign_values();
    const u64 b = matrix_descriptor<SWIZZLE>(shared_address(s.v[v_ring.stage]), V_ROWS * PANEL * 2);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < K_TILE / 16; ++step) {
      const u32 a[4] = {weights[4 * step], weights[4 * step + 1], weights[4 * step + 2], weights[4 * step + 3]};
      Wgmma<scalar_t, HEAD_DIM>::rs(out, a, b + (v_row(step * 16) * 2 >> 4));
    }
    wgmma_commit();
  }

  // Elements from a tile of values to a row of its first panel.
  static __device__ __forceinline__ constexpr int v_row(int row) {
    return row / V_ROWS * V_ROWS * HEAD_DIM + row % V_ROWS * PANEL;
  }

  // Others' values have weight 0, but 0 x NaN is NaN. Every consumer clears them all, so none waits for another.
  __device__ __forceinline__ void clear_foreign_values() {
    constexpr int CHUNKS = PANEL / 8;
    scalar_t* const tile = s.v[v_ring.stage];
    for (int i = v_rows * PANELS * CHUNKS + threadIdx.x % 128; i < K_TILE * PANELS * CHUNKS; i += 128) {
      const int panel = i / CHUNKS % PANELS;
      scalar_t* const row = tile + v_row(i / (CHUNKS * PANELS)) + panel * V_ROWS * PANEL;
      reinterpret_cast<uint4*>(row)[i % CHUNKS] = make_uint4(0, 0, 0, 0);
    }
    fence_async_shared();
    named_sync<128>(1 + CONSUMERS + group);
    v_rows = K_TILE;
  }

  __device__ __forceinline__ void scores_done() {
    pin(scores);
    release(s.k_empty[k_ring.stage]);
    k_ring.advance();
  }
  __device__ __forceinline__ void out_done() {
    pin(out);
    release(s.v_empty[v_ring.stage]);
    v_ring.advance();
  }
  __device__ __forceinline__ void wait_for_out() {
    if constexpr (OVERLAP) {
      wgmma_wait<0>();
      out_done();
    }
  }
  __device__ __forceinline__ void clear_out() {
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 2; ++i) out[i] = 0.f;
  }
  __device__ __forceinline__ void leave_q() {
    if (!BULK_STORE) release(s.q_empty[q_ring.stage][group]);
    q_ring.advance();
  }
  __device__ __forceinline__ void release(Barrier& empty) {
    if (lane() == 0) empty.arrive();
  }

  // --- scores to weights

  __device__ __forceinline__ void first_weights(const Work& work, Softmax& softmax) {
    const KeyTiles& keys = work.keys_of(group);
    cap_scores();
    if (keys.full_end < keys.end || keys.full_begin == keys.end) mask_scores(work, keys.end - 1);
    weigh<true>(softmax);
  }

  template <bool FIRST>
  __device__ __forceinline__ bool weigh(Softmax& softmax) {
    if constexpr (OVERLAP) return softmax.weigh<FIRST>(scores, coming_weights);
    else return softmax.weigh<FIRST>(scores, weights);
  }

  // `zero` is 0, but the compiler cannot know: it would let both arrays share registers, and then would have to
  // serialise the products that still read them (ptxas C7513).
  __device__ __forceinline__ void take_weights() {
    if constexpr (OVERLAP) {
#pragma unroll
      for (int i = 0; i < K_TILE / 4; ++i) weights[i] = coming_weights[i] ^ u32(p.zero);
    }
  }

  __device__ __forceinline__ void cap_scores() {
    if (SOFTCAP) {
#pragma unroll
      for (int i = 0; i < K_TILE / 2; ++i) scores[i] = tanh_by_exp2(scores[i] * p.softcap_scale);
    }
  }

  __device__ __forceinline__ void mask_scores(const Work& work, int n) {
    const auto mask = work.mask(p);
    const int column = n * K_TILE + lane() % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = token_of(work, half);
      const int first = mask.first(token) - column, end = mask.end(token) - column;
#pragma unroll
      for (int j = 0; j < K_TILE / 8; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          if (8 * j + i >= end || (HAS_LEFT && 8 * j + i < first)) scores[4 * j + 2 * half + i] = NEG_INF;
    }
  }

  static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }
  __device__ __forceinline__ int token_of(const Work& work, int half) const {
    return work.q_first_of(group) + threadIdx.x % 128 / 32 * 16 + lane() / 4 + half * 8;
  }

  // --- results to global memory

  // out / sum and lse. Quads trade their pairs of columns, so that a thread stores 16 bytes.
  __device__ __forceinline__ void store(const Work& work, Softmax& softmax) {
    if constexpr (BULK_STORE) return store_in_bulk(work, softmax);
    const float sink_log2 = SINKS ? p.sinks[work.head] * LOG2E : NEG_INF;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = token_of(work, half);
      float inverse, lse;
      softmax.finish(half, sink_log2, inverse, lse);
      scalar_t* row = p.out_row(work, token);
#pragma unroll
      for (int j = 0; j < HEAD_DIM / 8; j += 4) {
        u32 c[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
          c[i] = pack<scalar_t>(out[4 * (j + i) + 2 * half] * inverse, out[4 * (j + i) + 2 * half + 1] * inverse);
        transpose_quad(c);
        if (token < work.q_len)
          *reinterpret_cast<uint4*>(row + 8 * (j + lane() % 4)) = make_uint4(c[0], c[1], c[2], c[3]);
      }
      if (lane() % 4 == 0) p.store_lse(work, token, lse);
    }
  }

  // The same by way of shared memory, where this work's q was: no consumer reads that any more, and the copy engine
  // keeps to the tensor's rows.
  __device__ __forceinline__ void store_in_bulk(const Work& work, Softmax& softmax) {
    const float sink_log2 = SINKS ? p.sinks[work.head] * LOG2E : NEG_INF;
    float inverse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float lse;
      softmax.finish(half, sink_log2, inverse[half], lse);
      if (lane() % 4 == 0) p.store_lse(work, token_of(work, half), lse);
    }
    const int stage = (q_ring.stage + Q_STAGES - 1) % Q_STAGES;
    scalar_t* const tile = s.q[stage][group];
    const int row = threadIdx.x % 128 / 32 * 16 + lane() % 16;
#pragma unroll
    for (int j = 0; j < HEAD_DIM / 8; j += 2) {
      const u32 c[4] = {pack<scalar_t>(out[4 * j] * inverse[0], out[4 * j + 1] * inverse[0]),
                        pack<scalar_t>(out[4 * j + 2] * inverse[1], out[4 * j + 3] * inverse[1]),
                        pack<scalar_t>(out[4 * j + 4] * inverse[0], out[4 * j + 5] * inverse[0]),
                        pack<scalar_t>(out[4 * j + 6] * inverse[1], out[4 * j + 7] * inverse[1])};
      const int column = 8 * j + lane() / 16 * 8;
      store_matrices(shared_address(tile) + column / PANEL * Q_PANEL_BYTES + swizzled<SWIZZLE>(row, column % PANEL * 2),
                     c);
    }
    fence_async_shared();
    named_sync<128>(1 + CONSUMERS + group);
    leave(tile, stage, work.q_first_of(group), work.head, work.batch);
  }

  // The last results have left the place of a q, which is free again.
  __device__ __forceinline__ void free_q() {
    if (q_stage >= 0 && threadIdx.x % 128 == 0) {
      bulk_wait_read();
      s.q_empty[q_stage][group].arrive();
    }
  }

  // c[i] of quad lane j and c[j] of quad lane i change places.
  __device__ __forceinline__ void transpose_quad(u32 (&c)[4]) {
    const bool odd = lane() & 1, upper = lane() & 2;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const u32 got = __shfl_xor_sync(~0u, odd ? c[i] : c[i + 1], 1);
      if (odd) c[i] = got; else c[i + 1] = got;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const u32 got = __shfl_xor_sync(~0u, upper ? c[i] : c[i + 2], 2);
      if (upper) c[i] = got; else c[i + 2] = got;
    }
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attend(const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k,
           const __grid_constant__ TensorMap v, const __grid_constant__ Params p,
           const __grid_constant__ TensorMap out) {  // out: where BULK_STORE
  extern __shared__ __align__(1024) u8 memory[];
  Shared& s = *reinterpret_cast<Shared*>(memory);
  if (threadIdx.x == 0) s.init();
  if (threadIdx.x == 32) prefetch(q), prefetch(k), prefetch(v);
  __syncthreads();
  grid_launch_dependents();
  if (threadIdx.x < 128) {
    shrink_registers<PRODUCER_REGISTERS>();
    if (threadIdx.x < 32) Producer{p, s, q, k, v}.run();
  } else {
    grow_registers<CONSUMER_REGISTERS>();
    Consumer{out, p, s}.run();
  }
}
