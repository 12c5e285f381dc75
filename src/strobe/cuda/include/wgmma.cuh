// Matrix products of a warpgroup (wgmma, sm_90a): 64 rows at a time, asynchronous, B and optionally A in shared memory.
//
// Accumulators d[N / 2] of m64nNk16, with warp = warp of the group, row = lane / 4, pair = lane % 4:
//   d[4j + 0, 4j + 1]: row 16 warp + row, columns 8j + 2 pair + {0, 1};  d[4j + 2, 4j + 3]: row + 8
// A operand in registers a[4]: mma.sync's, so the packed accumulators of columns 16i .. 16i + 15 are one.
#pragma once

#include "matrix_descriptor.cuh"
#include "types.cuh"

// Around a run of products: registers written before are visible to it.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Close the run: one group to wait for.
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Wait until at most PENDING of the newest groups run.
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// Keep uses of these registers from moving across this point: the compiler does not know that products are asynchronous.
template <int N>
__device__ __forceinline__ void pin(float (&registers)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

// Products of m64nNk16. ss: d = a b, or d += a b, both operands K-major in shared memory.
// rs: d += a b, a in registers, b MN-major in shared memory.
template <class T, int N>
struct Wgmma;

// Operand lists for the assembler: the accumulators are operands 0 .. N / 2 - 1, what follows is counted from there.
#define STROBE_OUT8(i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define STROBE_O8 STROBE_OUT8(0)
#define STROBE_O16 STROBE_OUT8(0), STROBE_OUT8(8)
#define STROBE_O24 STROBE_O16, STROBE_OUT8(16)
#define STROBE_O32 STROBE_O16, STROBE_OUT8(16), STROBE_OUT8(24)
#define STROBE_O48 STROBE_O32, STROBE_OUT8(32), STROBE_OUT8(40)
#define STROBE_O64 STROBE_O48, STROBE_OUT8(48), STROBE_OUT8(56)
#define STROBE_O80 STROBE_O64, STROBE_OUT8(64), STROBE_OUT8(72)
#define STROBE_O96 STROBE_O80, STROBE_OUT8(80), STROBE_OUT8(88)
#define STROBE_O112 STROBE_O96, STROBE_OUT8(96), STROBE_OUT8(104)
#define STROBE_O128 STROBE_O112, STROBE_OUT8(112), STROBE_OUT8(120)
#define STROBE_D8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define STROBE_D16 STROBE_D8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define STROBE_D24 STROBE_D16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define STROBE_D32 STROBE_D16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define STROBE_D48 STROBE_D32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define STROBE_D64 STROBE_D48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define STROBE_D80 STROBE_D64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define STROBE_D96 STROBE_D80 ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define STROBE_D112 STROBE_D96 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define STROBE_D128 STROBE_D112 ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

#define STROBE_WGMMA(T, PTX, N, REGS, P0, P1, P2, P3, P4)                                                          \
  template <>                                                                                                      \
  struct Wgmma<T, N> {                                                                                             \
    template <bool ACCUMULATE>                                                                                     \
    static __device__ __forceinline__ void ss(float (&d)[N / 2], u64 a, u64 b) {                                   \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P2 ", 0;\n"                                                 \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." PTX "." PTX " {" STROBE_D##REGS "}, " P0 ", " \
                   P1 ", p, 1, 1, 0, 0;\n}"                                                                        \
                   : STROBE_O##REGS                                                                                \
                   : "l"(a), "l"(b), "n"(int(ACCUMULATE)));                                                        \
    }                                                                                                              \
    static __device__ __forceinline__ void rs(float (&d)[N / 2], const u32 (&a)[4], u64 b) {                       \
      asm volatile("{\n.reg .pred p;\nsetp.eq.b32 p, 0, 0;\n"                                                     \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." PTX "." PTX " {" STROBE_D##REGS "}, {" P0     \
                   ", " P1 ", " P2 ", " P3 "}, " P4 ", p, 1, 1, 1;\n}"                                             \
                   : STROBE_O##REGS                                                                                \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                          \
    }                                                                                                              \
  };
#define STROBE_WGMMA_BOTH(N, ...) STROBE_WGMMA(bf16, "bf16", N, __VA_ARGS__) STROBE_WGMMA(f16, "f16", N, __VA_ARGS__)

STROBE_WGMMA_BOTH(16, 8, "%8", "%9", "%10", "%11", "%12")
STROBE_WGMMA_BOTH(32, 16, "%16", "%17", "%18", "%19", "%20")
STROBE_WGMMA_BOTH(48, 24, "%24", "%25", "%26", "%27", "%28")
STROBE_WGMMA_BOTH(64, 32, "%32", "%33", "%34", "%35", "%36")
STROBE_WGMMA_BOTH(96, 48, "%48", "%49", "%50", "%51", "%52")
STROBE_WGMMA_BOTH(128, 64, "%64", "%65", "%66", "%67", "%68")
STROBE_WGMMA_BOTH(192, 96, "%96", "%97", "%98", "%99", "%100")
STROBE_WGMMA_BOTH(256, 128, "%128", "%129", "%130", "%131", "%132")
