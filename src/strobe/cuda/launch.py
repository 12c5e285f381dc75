"""A kernel on a device: its arguments packed, and launched.

Launches go through the address of `cuLaunchKernelEx` and ctypes structures laid out as cuda.h has
them: building the bindings' own config objects costs several times the launch itself.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from strobe.cuda import driver
from strobe.cuda.cubin import Cubin, Resources, arch_number
from strobe.errors import DeviceError

Dim = int | tuple[int, ...]

_CLUSTER_DIMENSION, _PROGRAMMATIC_STREAM_SERIALIZATION = 4, 6


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_uint), ("pad", ctypes.c_uint), ("value", ctypes.c_uint * 16)]


class _Config(ctypes.Structure):
    _fields_ = [
        *((f"{what}_{axis}", ctypes.c_uint) for what in ("grid", "block") for axis in "xyz"),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("attribute_count", ctypes.c_uint),
    ]

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.grid_x, self.grid_y, self.grid_z

    @property
    def block(self) -> tuple[int, int, int]:
        return self.block_x, self.block_y, self.block_z


class Launch:
    """One kernel, its grid and its arguments, packed once and launched any number of times.

    `args` holds the ctypes values as they were given: write to their fields (or `.value`) between
    launches and the next launch sees it. A launch copies them before it returns. Tensors are not
    kept alive, only their addresses. Not for two threads at once, unless nothing is written between their
    launches and they launch on one stream.
    """

    __slots__ = ("_config", "_handed", "_kernel", "_pointers", "_stream", "_submit", "args")

    def __init__(
        self,
        kernel: Kernel,
        grid: Dim,
        block: Dim,
        args: ctypes.Structure | Sequence[Any],
        *,
        shared_bytes: int = 0,
        cluster: Dim | None = None,
        programmatic: bool = False,
    ) -> None:
        config = _Config(*_dim3(grid), *_dim3(block), shared_bytes)
        if cluster is not None or programmatic:
            attributes = _attributes(cluster, programmatic)
            config.attributes = ctypes.addressof(attributes)
            config.attribute_count = len(attributes)
        given = [args] if isinstance(args, ctypes.Structure) else args
        self._pack(kernel, config, [_argument(arg) for arg in given])

    def _pack(self, kernel: Kernel, config: _Config, args: list[Any]) -> None:
        self._kernel, self._config, self.args = kernel, config, args
        self._stream = 0
        self._pointers = (ctypes.c_void_p * len(args))(*map(ctypes.addressof, args))
        self._submit = kernel._submit
        self._handed = ctypes.byref(config), kernel._function, ctypes.byref(self._pointers)

    def like(self, args: list[Any]) -> Launch:
        """Another one of this kernel, grid and block, with other arguments: ctypes values."""
        other = object.__new__(Launch)
        config = _Config.from_buffer_copy(self._config)
        config.stream = None
        other._pack(self._kernel, config, args)
        return other

    @property
    def grid(self) -> tuple[int, int, int]:
        """Blocks in x, y and z; may be set between launches."""
        return self._config.grid

    @grid.setter
    def grid(self, grid: Dim) -> None:
        self._config.grid_x, self._config.grid_y, self._config.grid_z = _dim3(grid)

    def point(self, argument: int, address: int) -> None:
        """Take argument number `argument` from this address from now on; what stands there must stay."""
        self._pointers[argument] = address

    def __call__(self, stream: int | None = None) -> None:
        """Launch on `stream` (a raw handle), or on torch's current stream of the kernel's device.

        Raises:
            DeviceError: the driver refuses the launch; the message holds its text.
        """
        kernel = self._kernel
        if kernel._current_device() == kernel.device:
            self.on(kernel._raw_stream(kernel.device) if stream is None else stream)
        else:
            import torch

            with torch.cuda.device(kernel.device):
                self(stream)

    def on(self, stream: int) -> None:
        """Launch on a stream of the kernel's device where that is the current device: nothing is looked up.

        Raises:
            DeviceError: as above.
        """
        if stream != self._stream:
            self._config.stream = self._stream = stream
        config, function, pointers = self._handed
        status = self._submit(config, function, pointers, None)
        if status == driver.ERROR_INVALID_CONTEXT:
            driver.make_current(self._kernel.device)
            status = self._submit(config, function, pointers, None)
        if status:
            kernel, shape = self._kernel, self._config
            raise DeviceError(
                f"launching {kernel.name} (grid {shape.grid}, block {shape.block}, "
                f"{shape.shared_bytes} B shared of {kernel.max_shared_bytes}): {driver.describe(status)}"
            )


class Kernel:
    """A kernel loaded on one device. Made by `jit.kernel`.

    `resources` is what the assembler reported, `max_shared_bytes` the most dynamic shared memory
    a block of it may ask for (already allowed, so a launch only names what it takes).
    """

    def __init__(self, cubin: Cubin, module: Any, entry: str, device: int) -> None:
        self.name = entry
        self.device = device
        self.resources: Resources | None = cubin.resources().get(entry)
        looking_up = f"looking {entry} up in {cubin.name}"
        cuda = driver.bindings()
        (self._handle,) = driver.check(cuda.cuModuleGetFunction(module, entry.encode()), looking_up)
        attribute = cuda.CUfunction_attribute
        optin = cuda.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
        (most,) = driver.check(cuda.cuDeviceGetAttribute(optin, device), looking_up)
        fixed = attribute.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES
        (static,) = driver.check(cuda.cuFuncGetAttribute(fixed, self._handle), looking_up)
        self.max_shared_bytes: int = most - static
        self._set(attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, self.max_shared_bytes)
        if arch_number(cubin.arch) >= 90:
            self._set(attribute.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1)
        self._prefers_shared_memory = False
        self._function = ctypes.c_void_p(int(self._handle))
        self._raw_stream, self._current_device = _torch_state()
        self._submit = _launch_kernel()

    def __repr__(self) -> str:
        return f"Kernel({self.name} on cuda:{self.device}, {self.resources})"

    def __call__(
        self,
        grid: Dim,
        block: Dim,
        args: ctypes.Structure | Sequence[Any],
        *,
        shared_bytes: int = 0,
        stream: int | None = None,
        cluster: Dim | None = None,
        programmatic: bool = False,
    ) -> None:
        """Pack the arguments and launch once.

        Args:
            grid, block, cluster: blocks, threads and blocks a cluster, an int or up to three.
            args: one ctypes.Structure (the kernel's only parameter, passed by value), or a sequence
                of tensors (their data_ptr; None is a null pointer) and ctypes values.
            stream: a raw handle; None is torch's current stream of the kernel's device.
            programmatic: may start before the kernel ahead of it in the stream ends (programmatic
                dependent launch); it must call griddepcontrol.wait before it reads that one's output.

        Raises:
            DeviceError: the driver refuses the launch; the message holds its text.
        """
        Launch(
            self, grid, block, args, shared_bytes=shared_bytes, cluster=cluster, programmatic=programmatic
        )(stream)

    def prepare(
        self, grid: Dim, block: Dim, args: ctypes.Structure | Sequence[Any], **options: Any
    ) -> Launch:
        """Pack once, launch often. Options: shared_bytes, cluster, programmatic (as Launch)."""
        return Launch(self, grid, block, args, **options)

    def prefer_shared_memory(self) -> None:
        """Run on SMs that give shared memory all they can, and L1 the rest.

        An SM divides its memory anew only when it is empty: kernels of which one is to start beside the
        other must ask for the same, whatever they need for themselves.
        """
        if not self._prefers_shared_memory:
            attribute = driver.bindings().CUfunction_attribute
            self._set(attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100)
            self._prefers_shared_memory = True

    def _set(self, attribute: Any, value: int) -> None:
        setting = f"setting {attribute.name} of {self.name}"
        driver.check(driver.bindings().cuFuncSetAttribute(self._handle, attribute, value), setting)


@cache  # launches hold the address only: every set of attributes lives on
def _attributes(cluster: Dim | None, programmatic: bool) -> Any:
    found = []
    if cluster is not None:
        found.append(_Attribute(_CLUSTER_DIMENSION, 0, _dim3(cluster)))
    if programmatic:
        found.append(_Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION, 0, (1,)))
    return (_Attribute * len(found))(*found)


def _argument(arg: Any) -> Any:
    if arg is None:
        return ctypes.c_void_p()
    if hasattr(arg, "data_ptr"):
        return ctypes.c_void_p(arg.data_ptr())
    if isinstance(arg, (ctypes.Structure, ctypes._SimpleCData, ctypes.Array)):
        return arg
    raise TypeError(f"a kernel argument is a {type(arg).__name__}; supported: tensors, None, ctypes values")


def _dim3(dim: Dim) -> tuple[int, int, int]:
    if isinstance(dim, int):
        return (dim, 1, 1)
    x, y, z = (*dim, 1, 1)[:3]
    return (x, y, z)


@cache
def _launch_kernel() -> Callable[..., int]:
    """cuLaunchKernelEx, without argument types: what ctypes made is handed on as it is, in 0.1 µs less."""
    return ctypes.CFUNCTYPE(ctypes.c_int)(driver.function_address("cuLaunchKernelEx", 11060))


@cache
def _torch_state() -> tuple[Callable[[int], int], Callable[[], int]]:
    """torch's current raw stream of a device, and its current device: C functions of about 0.1 µs."""
    import torch

    torch.cuda.init()
    return torch._C._cuda_getCurrentRawStream, torch._C._cuda_getDevice
