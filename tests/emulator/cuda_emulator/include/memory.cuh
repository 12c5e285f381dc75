// The emulator's memory.cuh.
#pragma once

inline uint4 load_once(const void* p) { return *static_cast<const uint4*>(p); }

template <class T>
T* computed_here(T* p) {
  return p;
}

template <class T>
T load_relaxed(const T* p, Where where = Where::current()) {
  emulator::look_at(p, sizeof(T), where);
  return *p;
}

inline void store_if(bool mine, void* p, uint4 x) {
  if (mine) *static_cast<uint4*>(p) = x;
}
