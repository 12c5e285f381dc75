"""Triton as a compiler: its kernels are kept, loaded and launched as those of CUDA C++ are.

Triton's own launch hashes its library in every process (0.25 s for 400 MB) and has a C compiler build a stub
for each signature. A kernel that is in the cache needs neither, nor Triton imported.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import importlib.metadata
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

import torch

from strobe.cuda import cache as disk
from strobe.cuda import driver, jit
from strobe.cuda.cubin import Cubin, arch_number
from strobe.cuda.tensor_map import tensor_map
from strobe.device import gpu
from strobe.errors import CompileError

_POINTERS = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32", "int32": "*i32"}
_DIVISOR = 16
"""Of addresses in bytes and of strides in elements: Triton then uses 16-byte accesses."""
_SWIZZLES = (0, 32, 64, 128)


class Stride(ctypes.c_int32):
    """Elements. Where 16 divides it, it takes another variant of the kernel than elsewhere."""


class LongStride(ctypes.c_int64):
    """The same, of dimensions that 2^31 elements may lie between."""


_NUMBERS = {ctypes.c_int32: "i32", ctypes.c_float: "fp32", Stride: "i32", LongStride: "i64"}


class Rows(NamedTuple):
    """A tensor `[rows, columns]` that a kernel reads through a descriptor, a tile at a time."""

    tensor: torch.Tensor
    tile: tuple[int, int]


Argument = Any
"""A tensor (its address), Rows, or a number: c_int32, c_float, Stride, LongStride."""
Constants = Mapping[str, int | bool]


@dataclass(frozen=True)
class Kernel:
    """A `@triton.jit` function by its module's and its own name. Its constants come after its arguments."""

    module: str
    entry: str

    @property
    def function(self) -> Any:
        """The function itself; imports Triton."""
        return getattr(importlib.import_module(self.module), self.entry)

    def digest(self, *parts: object) -> str:
        """Of its source, of this file, which reads what is kept, of Triton's version and `parts`."""
        told = json.dumps([self.entry, _text(self.module), _text(__name__), _version(), *parts])
        return hashlib.sha256(told.encode()).hexdigest()


@dataclass(frozen=True)
class Variant:
    """One compilation of a kernel: its arguments' types as Triton spells them, ":16" where divisible."""

    kernel: Kernel
    types: tuple[str, ...]
    constants: tuple[tuple[str, int | bool], ...]
    warps: int
    stages: int


def bind(
    kernel: Kernel,
    grid: tuple[int, ...],
    arguments: Sequence[Argument],
    constants: Constants,
    *,
    warps: int = 4,
    stages: int = 3,
) -> Callable[[], None]:
    """A call of the kernel, on the GPU that the tensors are on; on a CPU, in Triton's interpreter.

    Tensors are not kept alive, only their addresses.

    Raises:
        DeviceError: the driver refuses the kernel or its launch.
    """
    first = arguments[0]
    device = (first.tensor if isinstance(first, Rows) else first).get_device()
    if device < 0:
        return lambda: kernel.function[grid](*map(_interpreted, arguments), **constants)
    types = tuple(map(_type, arguments))
    variant = Variant(kernel, types, tuple(constants.items()), warps, stages)
    loaded, facts = _load(variant, device)
    packed = pack(arguments, facts)
    return loaded.prepare(grid, 32 * warps, packed, shared_bytes=facts["shared"])


def compile(variant: Variant, arch: str) -> Cubin:
    """Machine code, from the cache or compiled and kept, without a GPU; its log is `launch_facts` as JSON.

    Raises:
        CompileError: this Triton's code wants memory of its own besides its arguments.
    """
    kernel = variant.kernel
    key = kernel.digest(variant.types, variant.constants, variant.warps, variant.stages, arch)
    name = f"{kernel.module.rpartition('.')[2]}.py"
    found = disk.load(key, name, arch)
    if found is None:
        built = build(variant, arch)
        if built.metadata.global_scratch_size or built.metadata.profile_scratch_size:
            raise CompileError(
                f"Triton {_version()} wants scratch memory for {kernel.entry} on {arch}; supported: none",
                hint="install Triton 3.6 or 3.7, or choose a kernel that is not Triton's",
            )
        defines = tuple((constant, str(int(value))) for constant, value in variant.constants)
        found = Cubin(name, arch, defines, built.asm["cubin"], json.dumps(launch_facts(built)))
        disk.save(key, found)
    return found


def launch_facts(built: Any) -> dict[str, Any]:
    """What a launch must know: bytes of shared memory; swizzle in bytes and box of each tensor map, and where
    there are none (before Hopper) how many flags end each descriptor: one in Triton 3.6, two from 3.7 on."""
    told = built.metadata
    maps = [
        {"swizzle": _SWIZZLES[each["swizzle"]], "box": each["block_size"]}
        for each in told.tensordesc_meta or ()
    ]
    flags = len(re.findall(r"\.param \.[bu]8 ", built.asm["ptx"]))
    descriptors = sum(spelled.startswith("tensordesc") for spelled in built.src.signature.values())
    return {"shared": told.shared, "maps": maps, "flags": flags // max(descriptors, 1)}


def build(variant: Variant, arch: str) -> Any:
    """What Triton makes of it, with every level of its code (`asm`) and `metadata`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = variant.kernel.function
    names = function.arg_names
    types = [*variant.types, *["constexpr"] * len(variant.constants)]
    source = ASTSource(
        function,
        {name: spelled.partition(":")[0] for name, spelled in zip(names, types, strict=True)},
        {(names.index(name),): value for name, value in variant.constants},
        {(i,): [["tt.divisibility", _DIVISOR]] for i, spelled in enumerate(types) if ":" in spelled},
    )
    options = {"num_warps": variant.warps, "num_stages": variant.stages}
    return triton.compile(source, target=GPUTarget("cuda", arch_number(arch), 32), options=options)


def pack(arguments: Sequence[Argument], facts: Mapping[str, Any]) -> list[Any]:
    """The arguments as machine code has them; before Hopper a descriptor is an address, numbers, flags."""
    packed: list[Any] = []
    maps = iter(facts["maps"])
    for argument in arguments:
        if not isinstance(argument, Rows):
            packed.append(argument)
            continue
        tensor = argument.tensor
        sizes, strides = list(map(int, tensor.shape)), [tensor.stride(0), 1]
        if facts["maps"]:
            packed.append(_tensor_map(tensor, next(maps)))
        else:
            packed += [tensor, *map(ctypes.c_int64, (*sizes, *strides))]
            packed += [ctypes.c_uint8(0) for _ in range(facts["flags"])]
        packed += [*map(ctypes.c_int32, sizes), *map(ctypes.c_int64, strides)]
    return [*packed, None, None]  # scratch memory that none of them takes


def _tensor_map(tensor: torch.Tensor, told: Mapping[str, Any]) -> Any:
    rows, columns = tensor.shape
    return tensor_map(
        tensor.data_ptr(),
        str(tensor.dtype).removeprefix("torch."),
        (columns, rows),
        (tensor.stride(0) * tensor.element_size(),),
        tuple(reversed(told["box"])),
        swizzle=told["swizzle"],
        l2_promotion=128,
    )


def _type(argument: Argument) -> str:
    if isinstance(argument, Rows):
        element = _POINTERS[_dtype(argument.tensor)].removeprefix("*")
        return f"tensordesc<{element}{list(argument.tile)}>"
    if isinstance(argument, torch.Tensor):
        aligned = argument.data_ptr() % _DIVISOR == 0
        return _POINTERS[_dtype(argument)] + (f":{_DIVISOR}" if aligned else "")
    spelled = _NUMBERS[type(argument)]
    divisible = isinstance(argument, (Stride, LongStride)) and argument.value % _DIVISOR == 0
    return spelled + (f":{_DIVISOR}" if divisible else "")


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _interpreted(argument: Argument) -> Any:
    if isinstance(argument, Rows):
        from triton.tools.tensor_descriptor import TensorDescriptor

        tensor = argument.tensor
        return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(argument.tile))
    return argument if isinstance(argument, torch.Tensor) else argument.value


_loaded: dict[tuple[Variant, int], tuple[jit.Kernel, dict[str, Any]]] = {}


def _load(variant: Variant, device: int) -> tuple[jit.Kernel, dict[str, Any]]:
    found = _loaded.get((variant, device))
    if found is None:  # several threads may be here at once: Triton compiles in each
        cubin = compile(variant, gpu(device).target)
        module = driver.load_module(cubin, device)
        kernel = jit.Kernel(cubin, module, variant.kernel.entry, device)
        found = _loaded.setdefault((variant, device), (kernel, json.loads(cubin.log)))
    return found


@cache
def _version() -> str:
    """Triton's: its package's (cheap), or where it came under another name its own answer."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return importlib.import_module("triton").__version__


@cache
def _text(module: str) -> str:
    package, _, name = module.rpartition(".")
    return resources.files(package).joinpath(f"{name}.py").read_text(encoding="utf-8")
