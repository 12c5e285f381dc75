"""Tensor maps: what the bulk copy engine (TMA) needs to know of a tensor in global memory."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache, lru_cache

from strobe.cuda import driver
from strobe.errors import DeviceError

_DTYPES = {
    "uint8": 0, "float8_e4m3fn": 0, "uint16": 1, "uint32": 2, "int32": 3, "uint64": 4, "int64": 5,
    "float16": 6, "float32": 7, "float64": 8, "bfloat16": 9,
}  # fmt: skip
_SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}
_L2_PROMOTIONS = {0: 0, 64: 1, 128: 2, 256: 3}
_OUT_OF_BOUNDS = {"zero": 0, "nan": 1}


class TensorMap(ctypes.Structure):
    """An opaque CUtensorMap, 128 bytes: a kernel argument (`const __grid_constant__ TensorMap`, tma.cuh)."""

    _fields_ = [("opaque", ctypes.c_uint64 * 16)]


@lru_cache(maxsize=4096)
def tensor_map(
    pointer: int,
    dtype: str,
    sizes: tuple[int, ...],
    strides_bytes: tuple[int, ...],
    box: tuple[int, ...],
    *,
    swizzle: int = 128,
    l2_promotion: int = 256,
    out_of_bounds: str = "zero",
) -> TensorMap:
    """Describe a tensor to the copy engine (cuTensorMapEncodeTiled). The result is shared: do not write it.

    A copy's innermost coordinate must fall on 16 bytes: others are an illegal instruction on Hopper.

    Args:
        pointer: its first byte, 16-byte aligned.
        dtype: a torch dtype's name; float8 is copied as uint8.
        sizes: elements in each dimension, innermost first, up to 5.
        strides_bytes: of dimensions 1 and up (the innermost is contiguous); multiples of 16.
        box: elements of one copy, innermost first, each at most 256; its innermost row at most
            `swizzle` bytes where there is one.
        swizzle: 0, 32, 64 or 128 bytes.
        l2_promotion: 0, 64, 128 or 256 bytes.
        out_of_bounds: elements outside the tensor read as "zero" or (floats) "nan".

    Raises:
        DeviceError: the driver refuses the shape; the message names it.
    """
    rank, result = len(sizes), _unset()
    described = (
        ctypes.addressof(result),
        _DTYPES[dtype],
        rank,
        pointer,
        (ctypes.c_uint64 * rank)(*sizes),
        (ctypes.c_uint64 * max(rank - 1, 1))(*strides_bytes),
        (ctypes.c_uint32 * rank)(*box),
        (ctypes.c_uint32 * rank)(*[1] * rank),
        0,
        _SWIZZLES[swizzle],
        _L2_PROMOTIONS[l2_promotion],
        _OUT_OF_BOUNDS[out_of_bounds],
    )
    if status := _called(_encode(), *described):
        raise DeviceError(
            f"no tensor map of {dtype} sizes {sizes}, strides {strides_bytes} B, box {box}, "
            f"swizzle {swizzle}: {driver.describe(status)}"
        )
    return result


def moved(like: TensorMap, pointer: int) -> TensorMap:
    """The map of a tensor that differs in its address alone, 16-byte aligned (cuTensorMapReplaceAddress).

    Raises:
        DeviceError: the driver refuses the address.
    """
    result = _unset()
    ctypes.memmove(ctypes.addressof(result), ctypes.addressof(like), ctypes.sizeof(TensorMap))
    if status := _called(_replace_address(), ctypes.addressof(result), pointer):
        raise DeviceError(f"no tensor map at {pointer:#x}: {driver.describe(status)}")
    return result


def _called(function: Callable[..., int], *arguments: object) -> int:
    """Its status, in a thread that may have made no CUDA call yet."""
    status = function(*arguments)
    if status == driver.ERROR_INVALID_CONTEXT:
        driver.make_current()
        status = function(*arguments)
    return status


def _unset() -> TensorMap:
    """On 64 bytes, where the driver wants it; ctypes gives 8."""
    room = (ctypes.c_char * (ctypes.sizeof(TensorMap) + 64))()
    return TensorMap.from_buffer(room, -ctypes.addressof(room) % 64)


@cache
def _replace_address() -> Callable[..., int]:
    prototype = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
    return prototype(driver.function_address("cuTensorMapReplaceAddress", 12000))


@cache
def _encode() -> Callable[..., int]:
    pointer, number = ctypes.c_void_p, ctypes.c_uint32
    prototype = ctypes.CFUNCTYPE(
        ctypes.c_int, pointer, number, number, pointer, pointer, pointer, pointer, pointer,
        number, number, number, number,
    )  # fmt: skip
    return prototype(driver.function_address("cuTensorMapEncodeTiled", 12000))
