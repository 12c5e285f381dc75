// The emulator's barrier.cuh.
#pragma once

#include "ring.cuh"
#include "types.cuh"

struct Barrier {
  u64 state;

  u32 address() const { return shared_address(&state); }
  void init(int count, Where where = Where::current()) { emulator::barrier_init(word(), count, where); }
  void arrive(Where where = Where::current()) { emulator::barrier_arrive(word(), 0, where); }
  void arrive_if(bool mine, Where where = Where::current()) {
    if (mine) arrive(where);
  }
  void arrive_expecting(u32 bytes, Where where = Where::current()) { emulator::barrier_arrive(word(), bytes, where); }
  bool passed(u32 parity, Where where = Where::current()) const {
    return emulator::barrier_passed(word(), parity, where);
  }
  void wait(u32 parity, Where where = Where::current()) const {
    while (!passed(parity, where)) {
    }
  }
  uint64_t* word() const { return const_cast<uint64_t*>(reinterpret_cast<const uint64_t*>(&state)); }
};

inline void fence_barrier_init() {}
inline void fence_async_shared() { emulator::fence_async_shared(); }

template <int COUNT>
void named_sync(int id, Where where = Where::current()) {
  emulator::meet_block(id, COUNT, true, where);
}
template <int COUNT>
void named_arrive(int id, Where where = Where::current()) {
  emulator::meet_block(id, COUNT, false, where);
}

template <int COUNT>
void shrink_registers() {}
template <int COUNT>
void grow_registers() {}
