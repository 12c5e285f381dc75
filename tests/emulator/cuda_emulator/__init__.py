"""strobe's CUDA kernels on a CPU, thread by thread: the .cu files, compiled by g++.

from cuda_emulator import emulated_gpu
with emulated_gpu():                    # CPU tensors that say they are on a Hopper
    out = attention(q, k, v, kernel="cuda_async")
"""

from cuda_emulator.build import missing
from cuda_emulator.gpu import emulated_gpu
from cuda_emulator.kernel import EmulationError

__all__ = ["EmulationError", "emulated_gpu", "missing"]
