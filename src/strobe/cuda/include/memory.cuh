// Loads and stores of global memory that say more than a plain one.
#pragma once

// 16 bytes that are read once: they do not stay in L1. Nobody writes them while the kernel runs.
__device__ __forceinline__ uint4 load_once(const void* p) {
  uint4 x;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(p));
  return x;
}

// An address in global memory, computed where this stands: the compiler moves such work behind a wait that follows.
template <class T> __device__ __forceinline__ T* computed_here(T* p) {
  auto address = __cvta_generic_to_global(p);
  asm volatile("" : "+l"(address));
  return static_cast<T*>(__cvta_global_to_generic(address));
}

// What other blocks may be writing now, in any order. Words of it arrive whole.
__device__ __forceinline__ float4 load_relaxed(const float4* p) {
  float4 x;
  asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "l"(p)
               : "memory");
  return x;
}
__device__ __forceinline__ float2 load_relaxed(const float2* p) {
  float2 x;
  asm volatile("ld.relaxed.gpu.global.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "l"(p) : "memory");
  return x;
}

// By predicate, as Barrier::arrive_if.
__device__ __forceinline__ void store_if(bool mine, void* p, uint4 x) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %5, 0;\n@p st.global.v4.b32 [%0], {%1, %2, %3, %4};\n}" ::"l"(p),
               "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w), "r"(int(mine))
               : "memory");
}
