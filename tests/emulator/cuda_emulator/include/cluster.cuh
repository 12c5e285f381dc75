// The emulator's cluster.cuh.
#pragma once

#include "types.cuh"

inline u32 cluster_rank() { return emulator::cluster_rank(); }
inline u32 cluster_size() { return emulator::cluster_size(); }
inline void cluster_sync(Where where = Where::current()) {
  emulator::cluster_arrive(where);
  emulator::cluster_wait(where);
}

template <class T>
__attribute__((no_sanitize("thread"))) T load_remote(const T* p, u32 rank, Where where = Where::current()) {
  return *static_cast<const T*>(emulator::remote_shared(p, sizeof(T), rank, where));
}
