// Programmatic dependent launch (sm_90): a kernel may start while the one ahead of it in the stream still runs.
// Elsewhere both are nothing, and kernels follow one another.
#pragma once

// Wait until the kernel ahead has ended and all that it wrote can be read.
__device__ __forceinline__ void grid_dependency_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Let the kernel behind start once every block has called this or ended.
__device__ __forceinline__ void grid_launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
