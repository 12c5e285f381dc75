"""CUDA C++ compiled at run time and kept: source + defines + arch → cubin → a launchable kernel.

How a rung uses it:

    _SOURCE = Path(__file__).with_suffix(".cu")

    class Params(ctypes.Structure):        # the kernel's one parameter, `const __grid_constant__ Params p`
        _fields_ = [("q", c_void_p), ..., ("kv_len", c_int), ("scale_log2e", c_float)]

    def run(problem, q, k, v, out, lse):
        attend = jit.kernel(_SOURCE, "attend", {"HEAD_DIM": 128, "scalar_t": "bf16"}, q.get_device())
        attend(grid=(tiles, heads), block=128, args=Params(q.data_ptr(), ...), shared_bytes=65536)

    def sources(arch):                     # what `strobe cache warm` and the tests compile
        return [jit.Source(_SOURCE, {"HEAD_DIM": d, "scalar_t": "bf16"}) for d in (64, 128)]

Kernels are `extern "C" __global__`; headers come from the source's folder and strobe/cuda/include,
never from a toolkit. `kernel()` is one dictionary lookup (about 1 µs) after its first call. A call of
the Kernel packs arguments and launches; where a launch repeats, `Kernel.prepare` packs once:

    step = attend.prepare(grid, block, params, shared_bytes=n)   # params stays yours: rewrite its fields
    params.kv_len = 17; step()

Launches go on torch's current stream of the kernel's device unless `stream=` names another, check
their status (DeviceError), and can be captured in a CUDA graph. `cluster=` sets the cluster's blocks,
`programmatic=True` programmatic dependent launch. Any size of dynamic shared memory the device has is
allowed already. `tensor_map` makes TMA descriptors, passed as kernel arguments or Structure fields.

Compiling needs no GPU: `compile(source, defines, "sm_90a").resources()`. The default arch is the
device's own ("sm_90a" on Hopper: `arch_of`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from strobe.cuda import cache as disk
from strobe.cuda import driver, nvrtc
from strobe.cuda.cubin import Cubin, Resources, arch_number
from strobe.cuda.launch import Dim, Kernel, Launch
from strobe.cuda.nvrtc import Define, supported_archs
from strobe.cuda.tensor_map import TensorMap, moved, tensor_map
from strobe.device import gpu, resolve

__all__ = [
    "SCALAR", "Cubin", "Define", "Dim", "Kernel", "Launch", "Resources", "Source", "TensorMap",
    "arch_number", "arch_of", "compile", "kernel", "moved", "supported_archs", "tensor_map", "warm",
]  # fmt: skip

_log = logging.getLogger(__name__)

SCALAR = {"float16": "f16", "bfloat16": "bf16", "float32": "f32"}
"""The types that kernels are compiled for: a dtype's name → its name in types.cuh."""


class Source(NamedTuple):
    """One compilation: a .cu and its defines."""

    path: Path
    defines: Mapping[str, Define] = {}


def compile(source: Path, defines: Mapping[str, Define], arch: str) -> Cubin:
    """The machine code of `source`, from the cache or compiled and kept. Needs no GPU.

    Args:
        source: a .cu file.
        defines: macros, set before its first line.
        arch: "sm_80", "sm_90a", ...: exact, so that arch-specific instructions compile.

    Raises:
        CompileError: with the compiler's first error and its source line.
        DeviceError: NVRTC is not installed.
    """
    program = nvrtc.program(source, defines, arch)
    key = program.key
    found = _in_memory.get(key) or disk.load(key, program.name, arch)
    if found is None:
        start = time.perf_counter()
        found = nvrtc.build(program)
        disk.save(key, found)
        _log.info("compiled %s for %s in %.1f s", program.name, arch, time.perf_counter() - start)
    return _in_memory.setdefault(key, found)  # one object a key, also where two threads compiled it


def kernel(
    source: Path, entry: str, defines: Mapping[str, Define] | None = None, device: int | None = None
) -> Kernel:
    """The kernel `entry` of `source`, compiled for and loaded on a device (torch's current one by default).

    Raises:
        CompileError, DeviceError: as `compile`; and where there is no GPU, or no such kernel in the source.
    """
    if device is None:
        device = _current_device()
    key = (source, entry, tuple(defines.items()) if defines else (), device)
    found = _kernels.get(key)
    if found is None:
        with _loading:
            found = _kernels.get(key) or _load(source, entry, defines or {}, device)
            _kernels[key] = found
    return found


def arch_of(device: int | None = None) -> str:
    """The exact arch of a device: "sm_89", and with its own instructions from Hopper on: "sm_90a"."""
    return gpu(_current_device() if device is None else device).target


def warm(sources: Iterable[Source], arch: str, done: Callable[[Source, Cubin], None] | None = None) -> int:
    """Compile each source into the cache, several at a time; returns how many. `done` hears of each."""

    def one(source: Source) -> None:
        cubin = compile(source.path, source.defines, arch)
        if done:
            done(source, cubin)

    with ThreadPoolExecutor() as pool:
        return len(list(pool.map(one, sources)))


_in_memory: dict[str, Cubin] = {}
_modules: dict[tuple[int, int], Any] = {}
_kernels: dict[tuple[Any, ...], Kernel] = {}
_loading = threading.Lock()


def _load(source: Path, entry: str, defines: Mapping[str, Define], device: int) -> Kernel:
    cubin = compile(source, defines, arch_of(device))
    where = (id(cubin), device)  # _in_memory keeps every cubin, so ids are not reused
    if where not in _modules:
        _modules[where] = driver.load_module(cubin, device)
    return Kernel(cubin, _modules[where], entry, device)


def _current_device() -> int:
    return _device_function()()


@cache
def _device_function() -> Callable[[], int]:
    resolve("cuda")
    import torch

    torch.cuda.init()
    return torch._C._cuda_getDevice
