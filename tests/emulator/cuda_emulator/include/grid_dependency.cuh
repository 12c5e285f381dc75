// The emulator's grid_dependency.cuh: kernels follow one another, and what would be too early for a GPU is found.
#pragma once

inline void grid_dependency_wait() { emulator::wait_for_kernel_ahead(); }
inline void grid_launch_dependents() { emulator::launch_kernel_behind(); }
