"""A kernel on a device: loading, packing its arguments, launching.

Launches go through the address of `cuLaunchKernelEx` and ctypes structures laid out as cuda.h has
them: building the bindings' own config objects costs several times the launch itself.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

from strobe.cuda.cubin import Cubin, Resources
from strobe.errors import DeviceError

Dim = int | tuple[int, ...]

_COOPERATIVE, _CLUSTER_DIMENSION, _PROGRAMMATIC_STREAM_SERIALIZATION = 2, 4, 6
_ERROR_INVALID_CONTEXT = 201


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
    kept alive, only their addresses. Not for two threads at once.
    """

    __slots__ = ("_at", "_config", "_kernel", "_pointers", "args")

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
        cooperative: bool = False,
    ) -> None:
        self._kernel = kernel
        if isinstance(args, ctypes.Structure):
            self.args: list[Any] = [args]
            self._pointers: Any = ctypes.c_void_p(ctypes.addressof(args))
        else:
            self.args = [_argument(arg) for arg in args]
            self._pointers = (ctypes.c_void_p * len(self.args))(*map(ctypes.addressof, self.args))
        self._config = _Config(*_dim3(grid), *_dim3(block), shared_bytes)
        if cluster is not None or programmatic or cooperative:
            attributes = _attributes(cluster, programmatic, cooperative)
            self._config.attributes = ctypes.addressof(attributes)
            self._config.attribute_count = len(attributes)
        self._at = ctypes.addressof(self._config), ctypes.addressof(self._pointers)

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
        self._kernel._launch(self._config, self._at, stream)


class Kernel:
    """A kernel loaded on one device. Made by `jit.kernel`.

    `resources` is what the assembler reported, `max_shared_bytes` the most dynamic shared memory
    a block of it may ask for (already allowed, so a launch only names what it takes).
    """

    def __init__(self, cubin: Cubin, module: Any, entry: str, device: int) -> None:
        driver = _driver()
        self.name = entry
        self.device = device
        self.resources: Resources | None = cubin.resources().get(entry)
        looking_up = f"looking {entry} up in {cubin.name}"
        (self._handle,) = _check(driver.cuModuleGetFunction(module, entry.encode()), looking_up)
        attribute = driver.CUfunction_attribute
        optin = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
        (most,) = _check(driver.cuDeviceGetAttribute(optin, device), looking_up)
        fixed = attribute.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES
        (static,) = _check(driver.cuFuncGetAttribute(fixed, self._handle), looking_up)
        self.max_shared_bytes: int = most - static
        self._set(attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, self.max_shared_bytes)
        if int(cubin.arch.removeprefix("sm_").rstrip("af")) >= 90:
            self._set(attribute.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1)
        self._prefers_shared_memory = False
        self._function = int(self._handle)
        self._raw_stream, self._current_device = _torch_state()
        self._launch_kernel = _launch_kernel()

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
        """Pack once, launch often. Options: shared_bytes, cluster, programmatic, cooperative (as Launch)."""
        return Launch(self, grid, block, args, **options)

    def prefer_shared_memory(self) -> None:
        """Run on SMs that give shared memory all they can, and L1 the rest.

        An SM divides its memory anew only when it is empty: kernels of which one is to start beside the
        other must ask for the same, whatever they need for themselves.
        """
        if not self._prefers_shared_memory:
            attribute = _driver().CUfunction_attribute
            self._set(attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100)
            self._prefers_shared_memory = True

    def blocks_per_sm(self, threads: int, shared_bytes: int = 0) -> int:
        """How many blocks of this size one SM holds at a time."""
        count = _driver().cuOccupancyMaxActiveBlocksPerMultiprocessor
        return int(_check(count(self._handle, threads, shared_bytes), f"counting blocks of {self.name}")[0])

    def _set(self, attribute: Any, value: int) -> None:
        setting = f"setting {attribute.name} of {self.name}"
        _check(_driver().cuFuncSetAttribute(self._handle, attribute, value), setting)

    def _launch(self, config: _Config, at: tuple[int, int], stream: int | None) -> None:
        """Launch with the config and the pointers to the arguments that stand at these addresses."""
        if self._current_device() != self.device:
            import torch

            with torch.cuda.device(self.device):
                self._launch(config, at, stream)
            return
        config.stream = self._raw_stream(self.device) if stream is None else stream
        config_at, pointers_at = at
        status = self._launch_kernel(config_at, self._function, pointers_at, None)
        if status == _ERROR_INVALID_CONTEXT:  # this thread has made no CUDA call yet
            make_current(self.device)
            status = self._launch_kernel(config_at, self._function, pointers_at, None)
        if status:
            raise DeviceError(
                f"launching {self.name} (grid {config.grid}, block {config.block}, "
                f"{config.shared_bytes} B shared of {self.max_shared_bytes}): {describe(status)}"
            )


def load_module(cubin: Cubin, device: int) -> Any:
    """Load a cubin on a device, also while a stream is being captured."""
    make_current(device)
    with relaxed_capture():
        image = ctypes.create_string_buffer(cubin.image, len(cubin.image))
        loading = f"loading {cubin.name} for {cubin.arch}"
        return _check(_driver().cuModuleLoadData(ctypes.addressof(image)), loading)[0]


@contextmanager
def relaxed_capture() -> Iterator[None]:
    """Calls of this thread that a stream's capture would forbid are allowed: loading, allocating, waiting."""
    driver = _driver()
    relaxed = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    (mode,) = _check(driver.cuThreadExchangeStreamCaptureMode(relaxed), "entering relaxed capture")
    try:
        yield
    finally:
        driver.cuThreadExchangeStreamCaptureMode(mode)


def make_current(device: int) -> None:
    """Make torch's (the primary) context of `device` current in this thread."""
    _check(_driver().cuCtxSetCurrent(_primary_context(device)), f"entering cuda:{device}")


@cache
def _primary_context(device: int) -> Any:
    _check(_driver().cuInit(0), "starting CUDA")
    return _check(_driver().cuDevicePrimaryCtxRetain(device), f"opening cuda:{device}")[0]


@cache  # launches hold the address only: every set of attributes lives on
def _attributes(cluster: Dim | None, programmatic: bool, cooperative: bool) -> Any:
    found = []
    if cluster is not None:
        found.append(_Attribute(_CLUSTER_DIMENSION, 0, _dim3(cluster)))
    if programmatic:
        found.append(_Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION, 0, (1,)))
    if cooperative:
        found.append(_Attribute(_COOPERATIVE, 0, (1,)))
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
def _driver() -> Any:
    try:
        from cuda.bindings import driver

        driver.cuDriverGetVersion()
    except (ImportError, RuntimeError) as error:
        raise DeviceError(
            f"the CUDA driver cannot be loaded: {' '.join(str(error).split())}",
            hint="CUDA kernels need an NVIDIA GPU, its driver, and pip install 'strobe[gpu]'",
        ) from error
    return driver


@cache
def _launch_kernel() -> Callable[..., int]:
    address = driver_function("cuLaunchKernelEx", 11060)
    prototype = ctypes.CFUNCTYPE(
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p
    )
    return prototype(address)


def driver_function(name: str, version: int) -> int:
    """The address of a driver function as of a CUDA version (12020 is 12.2)."""
    address, _ = _check(_driver().cuGetProcAddress(name.encode(), version, 0), f"looking {name} up")
    if not int(address):
        raise DeviceError(f"the CUDA driver has no {name}", hint="update the NVIDIA driver")
    return int(address)


@cache
def _torch_state() -> tuple[Callable[[int], int], Callable[[], int]]:
    """torch's current raw stream of a device, and its current device: C functions of about 0.1 µs."""
    import torch

    torch.cuda.init()
    return torch._C._cuda_getCurrentRawStream, torch._C._cuda_getDevice


def _check(answer: tuple[Any, ...], doing: str) -> tuple[Any, ...]:
    status, *values = answer
    if status.value:
        raise DeviceError(f"{doing}: {describe(status.value)}")
    return tuple(values)


def describe(status: int) -> str:
    driver = _driver()
    try:
        result = driver.CUresult(status)
    except ValueError:
        return f"CUDA error {status}"
    _, text = driver.cuGetErrorString(result)
    return f"{result.name}: {text.decode() if text else 'no text'}"
