// The emulator's grid_dependency.cuh: kernels follow one another.
#pragma once

inline void grid_dependency_wait() {}
inline void grid_launch_dependents() {}
