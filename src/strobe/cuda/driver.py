"""The CUDA driver: its functions, the contexts and modules it holds, its errors as DeviceError."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from strobe.cuda.bindings import load
from strobe.cuda.cubin import Cubin
from strobe.errors import DeviceError

ERROR_INVALID_CONTEXT = 201
"""What a thread hears that has made no CUDA call yet: `make_current`, and call again."""


@cache
def bindings() -> Any:
    """NVIDIA's Python bindings of the driver.

    Raises:
        DeviceError: they are not installed, or this machine has no driver.
    """
    hint = "CUDA kernels need an NVIDIA GPU, its driver, and pip install 'strobe[gpu]'"
    return load("driver", "cuDriverGetVersion", "the CUDA driver", hint)


def check(answer: tuple[Any, ...], doing: str) -> tuple[Any, ...]:
    """What a call of the bindings gave besides its status. Raises DeviceError where that is no success."""
    status, *values = answer
    if status.value:
        raise DeviceError(f"{doing}: {describe(status.value)}")
    return tuple(values)


def describe(status: int) -> str:
    """A status's name and text."""
    driver = bindings()
    try:
        result = driver.CUresult(status)
    except ValueError:
        return f"CUDA error {status}"
    _, text = driver.cuGetErrorString(result)
    return f"{result.name}: {text.decode() if text else 'no text'}"


def function_address(name: str, version: int) -> int:
    """The address of a driver function as of a CUDA version (12020 is 12.2)."""
    address, _ = check(bindings().cuGetProcAddress(name.encode(), version, 0), f"looking {name} up")
    if not int(address):
        raise DeviceError(f"the CUDA driver has no {name}", hint="update the NVIDIA driver")
    return int(address)


def load_module(cubin: Cubin, device: int) -> Any:
    """Load a cubin on a device, also while a stream is being captured."""
    make_current(device)
    with relaxed_capture():
        image = ctypes.create_string_buffer(cubin.image, len(cubin.image))
        loading = f"loading {cubin.name} for {cubin.arch}"
        return check(bindings().cuModuleLoadData(ctypes.addressof(image)), loading)[0]


@contextmanager
def relaxed_capture() -> Iterator[None]:
    """Calls of this thread that a stream's capture would forbid are allowed: loading, allocating, waiting."""
    driver = bindings()
    relaxed = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    (mode,) = check(driver.cuThreadExchangeStreamCaptureMode(relaxed), "entering relaxed capture")
    try:
        yield
    finally:
        driver.cuThreadExchangeStreamCaptureMode(mode)


def make_current(device: int | None = None) -> None:
    """Make torch's (the primary) context of a device, torch's current one by default, this thread's."""
    if device is None:
        import torch

        device = torch.cuda.current_device()
    check(bindings().cuCtxSetCurrent(_primary_context(device)), f"entering cuda:{device}")


@cache
def _primary_context(device: int) -> Any:
    check(bindings().cuInit(0), "starting CUDA")
    return check(bindings().cuDevicePrimaryCtxRetain(device), f"opening cuda:{device}")[0]
