// The emulator's async_copy.cuh: bytes arrive when their group is waited for, no earlier.
#pragma once

#include "types.cuh"

inline void copy_async_16(u32 shared, const void* global, bool valid, Where where = Where::current()) {
  emulator::copy_async(shared, global, 16, valid, where);
}
inline void commit_copies() { emulator::commit_copies(); }
template <int PENDING>
void wait_copies() {
  emulator::wait_copies(PENDING);
}
