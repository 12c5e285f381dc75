// The emulator's cluster_push.cuh: a store arrives when the barrier that it tells is looked at, no earlier.
#pragma once

#include "barrier.cuh"

inline void cluster_arrive(Where where = Where::current()) { emulator::cluster_arrive(where); }
inline void cluster_wait(Where where = Where::current()) { emulator::cluster_wait(where); }

template <class T>
void push(T* p, T x, Barrier& full, u32 rank, Where where = Where::current()) {
  emulator::push(p, &x, sizeof x, full.word(), rank, where);
}
