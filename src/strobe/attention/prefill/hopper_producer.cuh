// The producers: one warp draws works and copies their q and keys, another their values.
//
// Defines: as cuda_hopper.cu.
#pragma once

#include "grid_dependency.cuh"
#include "hopper_work.cuh"
#include "tma.cuh"

// What both do: copy key tiles.
struct Producer {
  const Params& p;
  Shared& s;
  const int lane = threadIdx.x % 32;
  Ring<STAGES> ring;  // of keys, or of values
  Ring<WORKS> work_ring;

  struct KeyRows {
    int kv_head, batch, start, len;
  };

  __device__ __forceinline__ Producer(const Params& p, Shared& s) : p(p), s(s) {}

  __device__ __forceinline__ KeyRows rows_of(const Work& work) const {
    return {work.head / p.group, work.batch, work.kv_start, work.kv_len};
  }

  // PAGED: where this lane's keys of key tile n stand, or -1. Asked for early: it takes as long as the copy.
  __device__ __forceinline__ int page_of(const KeyRows& rows, int n) const {
    const int key = n * K_TILE + lane * PAGE_ROWS;
    if (!PAGED || lane >= K_TILE / PAGE_ROWS || key < 0 || key >= rows.len) return -1;
    return p.page_table[i64(rows.batch) * p.pages_per_row + key / PAGE];
  }

  // Key tile n, in one copy or in one a page.
  template <int TOGETHER>
  __device__ __forceinline__ void load(scalar_t* tile, const TensorMap& map, Barrier& full, const KeyRows& rows, int n,
                                       int page) {
    if constexpr (PAGED) {
      load_pages<TOGETHER>(tile, map, full, rows, n, page);
    } else if (elect_lane()) {
      full.arrive_expecting(KV_BYTES);
      tma_load(tile, map, full, 0, rows.start + n * K_TILE, 0, rows.kv_head, PACKED_KV ? 0 : rows.batch);
    }
  }

  // Panels of TOGETHER rows side by side. All page numbers first, then all copies, by one lane and with no branch: page
  // by page it would take a warp longer than the products take. Page -1 is outside of the tensor: zeros, and no read.
  template <int TOGETHER>
  __device__ __forceinline__ void load_pages(scalar_t* tile, const TensorMap& map, Barrier& full, const KeyRows& rows,
                                             int n, int page) {
    constexpr int PAGES = K_TILE / PAGE_ROWS, AT_ONCE = PAGES % 2 ? 1 : PAGES % 4 ? 2 : 4;
#pragma unroll
    for (int first = 0; first < PAGES; first += AT_ONCE) {
      int at[AT_ONCE];
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) at[i] = __shfl_sync(~0u, page, first + i);
      if (elect_lane()) {
        if (first == 0) full.arrive_expecting(KV_BYTES);
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
          const int row = (first + i) * PAGE_ROWS, in_page = (n * K_TILE + row) % PAGE;
          if constexpr (TOGETHER == PAGE_ROWS) {
            tma_load(tile + row * HEAD_DIM, map, full, 0, in_page, 0, rows.kv_head, at[i]);
          } else {
#pragma unroll
            for (int panel = 0; panel < PANELS; ++panel)
              tma_load(tile + (panel * K_TILE + row) * PANEL, map, full, 0, in_page, panel, rows.kv_head, at[i]);
          }
        }
      }
      __syncwarp();
    }
  }
};

struct KeyProducer : Producer {
  const TensorMap &q, &k;
  Ring<Q_STAGES> q_ring;
  bool begun = false;  // what the first work begins with goes ahead of what it needs later

  __device__ __forceinline__ KeyProducer(const Params& p, Shared& s, const TensorMap& q, const TensorMap& k)
      : Producer(p, s), q(q), k(k) {}

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
      const int first = FOLDED ? mirrored * ROWS : q_tile * Q_TILE + part * ROWS;
      const int last = min(first + Q_TILE / Work::PARTS, work.q_len) - 1;
      work.q_first[part] = first;
      work.keys[part] = KeyTiles::of<K_TILE>(work.mask(p), first, last);
      work.keys[part].begin = work.keys[0].begin;
    }
    if (KEYLESS) {
      const int begin = work.keys[0].begin, end = work.q_first[0] < work.q_len ? work.all_keys().end : begin;
#pragma unroll
      for (int part = 0; part < Work::PARTS; ++part)
        work.keys[part].end = begin < end ? max(work.keys[part].end, begin + 1) : begin;
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

  // What queries that see no key get. Others hear of works with keys alone: consumers hold one until they have the next.
  __device__ __forceinline__ void store_nothing(const Work& work) {
    constexpr int CHUNKS = HEAD_DIM / 8;
    const int first = work.q_first_of(0), rows = min(Q_TILE, work.q_len - first);
#pragma unroll 1
    for (int i = lane; i < rows * CHUNKS; i += 32) {
      scalar_t* const row = p.out_row(work, first + i / CHUNKS);
      reinterpret_cast<uint4*>(row)[i % CHUNKS] = make_uint4(0, 0, 0, 0);
    }
#pragma unroll 1
    for (int i = lane; i < rows; i += 32) p.store_lse(work, first + i, SINKS ? p.sinks[work.head] : NEG_INF);
  }

  __device__ __forceinline__ void load_q(const Work& work, int c) {
    Barrier& full = s.q_full[q_ring.stage][c];
    s.q_empty[q_ring.stage][c].wait(q_ring.parity ^ 1);
    if (elect_lane()) {
      full.arrive_expecting(Q_BYTES);
      const int row = work.q_start + work.q_first_of(c);
      tma_load(s.q[q_ring.stage][c], q, full, 0, row, 0, work.head, PACKED_Q ? 0 : work.batch);
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
    Work none;
    none.head = -1;
    publish(none);
  }

  // Each tile draws once: who drew last leaves the counter as it was.
  __device__ __forceinline__ void leave_counter(int drawn, int tiles) {
    if (lane == 0 && drawn == tiles - 1) atomicExch(p.next_tile, 0);
  }

  // A work, its q and its keys; returns what was drawn meanwhile.
  __device__ __forceinline__ int load(const Work& work) {
    if (!KEYLESS || work.sees_keys()) publish(work);
    else store_nothing(work);
    if (!KEYLESS) grid_dependency_wait();  // consumers write what depends on loads alone, so they need not
    const KeyRows rows = rows_of(work);
    const int first = first_of(work.all_keys()), last = last_of(work.all_keys());
    // The next tile is drawn just early enough to hide the latency. Earlier, a block with a long tile would hold back
    // a tile of the head that is in L2 now.
    const int draw_at = ASCENDING ? max(first, last - 2) : min(first, last + 2);
    int drawn = 0, page = page_of(rows, first);
    if (KEYLESS && !work.sees_keys()) drawn = draw();
    for (int n = first; ASCENDING ? n <= last : n >= last; n += NEXT) {
      if (n == first) load_q(work, 0);
      s.k_empty[ring.stage].wait(ring.parity ^ 1);
      Producer::load<K_TILE>(s.k[ring.stage], k, s.k_full[ring.stage], rows, n, page);
      ring.advance();
      if (n == first) {
#pragma unroll
        for (int c = 1; c < CONSUMERS; ++c) load_q(work, c);
        q_ring.advance();
        if (!begun) {
          s.q_full[0][CONSUMERS - 1].wait(0);
          s.begun.arrive_if(lane == 0);
          begun = true;
        }
      }
      if (!FOLDED && n == draw_at) drawn = draw();
      page = page_of(rows, n + NEXT);
    }
    return __shfl_sync(~0u, drawn, 0);
  }
};

struct ValueProducer : Producer {
  const TensorMap& v;

  __device__ __forceinline__ ValueProducer(const Params& p, Shared& s, const TensorMap& v) : Producer(p, s), v(v) {}

  __device__ __forceinline__ void run() {
    grid_dependency_wait();
    for (bool begun = false;; begun = true) {
      const Work& work = s.work[work_ring.stage];
      s.work_full[work_ring.stage].wait(work_ring.parity);
      if (work.head < 0) return;
      const KeyRows rows = rows_of(work);
      const int last = last_of(work.all_keys());
      int n = first_of(work.all_keys()), page = page_of(rows, n);
      __syncwarp();
      s.work_empty[work_ring.stage].arrive_if(lane == 0);
      work_ring.advance();
      if (!begun) s.begun.wait(0);
      for (; ASCENDING ? n <= last : n >= last; n += NEXT) {
        s.v_empty[ring.stage].wait(ring.parity ^ 1);
        load<V_ROWS>(s.v[ring.stage], v, s.v_full[ring.stage], rows, n, page);
        ring.advance();
        page = page_of(rows, n + NEXT);
      }
    }
  }
};
