"""What kernels are made of: floats at an address, and an `exp` that runs sixteen at a time. Imports numba."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_FLOAT, _INT32, _INT64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)


def _pointer(element: Any, kind: Any) -> Any:
    @intrinsic
    def pointer(context: Any, address: Any) -> Any:
        def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], kind.as_pointer())

        return types.CPointer(element)(types.intp), generate

    return pointer


_float32_pointer = _pointer(types.float32, _FLOAT)
_int32_pointer = _pointer(types.int32, _INT32)
_int64_pointer = _pointer(types.int64, _INT64)


@numba.njit
def floats(address, shape):
    """The float32 array of this shape at `address`, contiguous."""
    return numba.carray(_float32_pointer(address), shape)


@numba.njit
def integers(address, shape):
    """The int32 array of this shape at `address`, contiguous."""
    return numba.carray(_int32_pointer(address), shape)


@numba.njit
def longs(address, shape):
    """The int64 array of this shape at `address`, contiguous."""
    return numba.carray(_int64_pointer(address), shape)


@numba.njit
def address(numbers):
    """Where an array lies."""
    return np.intp(numbers.ctypes.data)


@intrinsic
def take(context: Any, counter: Any) -> Any:
    """The next of the parts that threads share, counted in the int64 at this address."""

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        at = builder.inttoptr(arguments[0], _INT64.as_pointer())
        return builder.atomic_rmw("add", at, _INT64(1), "monotonic")

    return types.int64(types.intp), generate


@intrinsic
def _nearest(context: Any, x: Any) -> Any:
    """The nearest integer, as a float32."""

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rint = builder.module.declare_intrinsic("llvm.rint", [_FLOAT])
        return builder.call(rint, arguments)

    return types.float32(types.float32), generate


@intrinsic
def _power_of_two(context: Any, n: Any) -> Any:
    """2ⁿ of an integer n from -126 to 127, by its bits."""

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        exponent = builder.add(builder.fptosi(arguments[0], _INT32), _INT32(127))
        return builder.bitcast(builder.shl(exponent, _INT32(23)), _FLOAT)

    return types.float32(types.float32), generate


LOWEST, HIGHEST = np.float32(-87.33654), np.float32(88.37626)
_LOG2E, _LN2_HIGH, _LN2_LOW = np.float32(1.442695), np.float32(0.693359375), np.float32(-2.12194440e-4)
_TAYLOR = tuple(np.float32(1 / n) for n in (5040, 720, 120, 24, 6, 2))
ONE = np.float32(1.0)


@numba.njit(fastmath={"contract"})  # said, or it is inherited: a caller's reassociation undoes r's two steps
def exp(x):
    """eˣ to 2 units in the last place, for x from `LOWEST` to `HIGHEST`; what is outside is taken for these.

    eˣ = 2ⁿ eʳ, with n the nearest integer to x / ln 2, and eʳ by its Taylor series, |r| <= ln(2) / 2.
    """
    x = LOWEST if x < LOWEST else x
    x = HIGHEST if x > HIGHEST else x
    n = _nearest(x * _LOG2E)
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    series = _TAYLOR[0]
    series = series * r + _TAYLOR[1]
    series = series * r + _TAYLOR[2]
    series = series * r + _TAYLOR[3]
    series = series * r + _TAYLOR[4]
    series = series * r + _TAYLOR[5]
    return (series * r * r + (r + ONE)) * _power_of_two(n)
