// The emulator's tma.cuh: a box arrives when its barrier is looked at, and leaves when it is waited for.
#pragma once

#include "barrier.cuh"

struct alignas(64) TensorMap {
  u64 opaque[16];
};

inline void prefetch(const TensorMap&) {}
inline bool elect_lane() { return threadIdx.x % 32 == 0; }

inline void tma_load(void* shared, const TensorMap& map, Barrier& full, int c0, int c1, int c2, int c3, int c4,
                     Where where = Where::current()) {
  emulator::tma_load(shared, &map, full.word(), {c0, c1, c2, c3, c4}, where);
}
inline void tma_load_once(void* shared, const TensorMap& map, Barrier& full, int c0, int c1, int c2, int c3, int c4,
                          Where where = Where::current()) {
  emulator::tma_load(shared, &map, full.word(), {c0, c1, c2, c3, c4}, where);
}
inline void tma_store(const TensorMap& map, const void* shared, int c0, int c1, int c2, int c3, int c4,
                      Where where = Where::current()) {
  emulator::tma_store(&map, shared, {c0, c1, c2, c3, c4}, where);
}
inline void bulk_commit() { emulator::commit_stores(); }
inline void bulk_wait_read() { emulator::wait_stores(0); }
