"""What threads meet by: int64s in memory that they share, and waiting for one another. Imports numba."""

from __future__ import annotations

import os
import platform
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_INT32, _INT64 = ir.IntType(32), ir.IntType(64)


def _at(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, _INT64.as_pointer())


@intrinsic
def add(context: Any, address: Any, number: Any) -> Any:
    """Adds to the number at an address; what was there."""

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("add", _at(builder, arguments[0]), arguments[1], "acq_rel")

    return types.int64(types.intp, types.int64), generate


@intrinsic
def replace(context: Any, address: Any, old: Any, new: Any) -> Any:
    """Puts `new` where `old` stands, at an address; whether it stood there."""

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        at, expected, value = _at(builder, arguments[0]), arguments[1], arguments[2]
        return builder.extract_value(builder.cmpxchg(at, expected, value, "acq_rel", "acquire"), 1)

    return types.boolean(types.intp, types.int64, types.int64), generate


@intrinsic
def load(context: Any, address: Any) -> Any:
    """The number at an address, after which all is seen that was written before it was put there."""

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(_at(builder, arguments[0]), "acquire", 8)

    return types.int64(types.intp), generate


@intrinsic
def store(context: Any, address: Any, number: Any) -> Any:
    """Puts a number at an address, after all that was written before."""

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.store_atomic(arguments[1], _at(builder, arguments[0]), "release", 8)
        return target.get_dummy_value()

    return types.void(types.intp, types.int64), generate


@intrinsic
def pause(context: Any) -> Any:
    """Tells a core that its thread waits for another; nothing where that is not known how."""

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if platform.machine() in ("x86_64", "AMD64"):
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])
        return target.get_dummy_value()

    return types.void(), generate


@intrinsic
def nap(context: Any) -> Any:
    """Gives the core away for some 50 us; nothing on systems that are not POSIX."""

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if os.name == "posix":
            kind = ir.FunctionType(_INT32, [_INT32])
            usleep = cgutils.get_or_insert_function(builder.module, kind, "usleep")
            builder.call(usleep, [_INT32(1)])  # and what the system adds
        return target.get_dummy_value()

    return types.void(), generate


@intrinsic
def call(context: Any, function: Any, argument: Any) -> Any:
    """The C function `void(int64)` at an address."""

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [_INT64])
        builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), [arguments[1]])
        return target.get_dummy_value()

    return types.void(types.intp, types.intp), generate
