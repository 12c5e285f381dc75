"""strobe's CUDA kernels on a CPU: the .cu files, compiled by g++, run thread by thread, every access watched.

    from cuda_emulator import emulated_gpu
    with emulated_gpu(sm_count=3):          # CPU tensors that say they are on a Hopper
        out = attention(q, k, v, kernel="cuda_async")

strobe's own host code runs as it is, and so do the kernels but for the headers that hold PTX, which
`include/` replaces by name. The threads of a block are fibers of one OS thread; the blocks of a grid
follow one another, and run side by side where they wait for one another.

Emulated: barriers of blocks, warps, clusters and memory (mbarrier); shuffles and votes; mma, wgmma,
ldmatrix, stmatrix, movmatrix; cp.async, bulk and tensor copies both ways, with swizzles and multicast;
shared memory of other blocks in a cluster; atomics; f16, bf16 and e4m3 rounded bit for bit.
Asynchronous work is done as late as it may be, and shared memory starts as NaN, so that a missing wait
shows. An `EmulationError` names thread and source line of

- an access outside of the tensors and shared memory that the kernel was given, or off its alignment;
- two accesses of shared memory that nothing orders, or an engine's with no proxy fence before it;
- under programmatic launch, an access that meets one of a kernel ahead which was not waited for;
- a barrier or warp-wide operation that diverges; a deadlock, with where each warp stands;
- what a launch or an engine refuses: sizes of arguments, blocks, shared memory, tensor maps.

Not emulated: time, caches and memory models. Races in global memory, a missing wgmma fence, and
`volatile` loops that spin (use atomics or load_relaxed) are not seen; float32 sums inside an mma are
taken in one order, exp2 and its kin are libm's; one kernel ends before the next one starts.
"""

from cuda_emulator.build import missing
from cuda_emulator.gpu import emulated_gpu
from cuda_emulator.kernel import EmulationError

__all__ = ["EmulationError", "emulated_gpu", "missing"]
