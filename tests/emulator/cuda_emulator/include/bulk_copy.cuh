// The emulator's bulk_copy.cuh: bytes arrive when their barrier is looked at, no earlier.
#pragma once

#include "barrier.cuh"

inline void bulk_copy(void* shared, const void* global, u32 bytes, Barrier& full, Where where = Where::current()) {
  emulator::bulk_copy(shared, global, bytes, full.word(), where);
}
