"""Stand-in for `jit.tensor_map`: what the emulated copy engine reads of a tensor, in a map's 128 bytes."""

from __future__ import annotations

import ctypes

from strobe.cuda.tensor_map import TensorMap
from strobe.errors import DeviceError

_BYTES = {"uint8": 1, "float8_e4m3fn": 1, "float16": 2, "bfloat16": 2, "uint16": 2, "float32": 4, "int32": 4}


class _Map(ctypes.Structure):
    """`TensorMap` of include/tma.cuh."""

    _fields_ = [
        ("pointer", ctypes.c_uint64),
        ("strides", ctypes.c_uint64 * 5),  # bytes
        ("sizes", ctypes.c_uint32 * 5),
        ("box", ctypes.c_uint16 * 5),
        ("element_bytes", ctypes.c_uint16),
        ("rank", ctypes.c_uint16),
        ("swizzle", ctypes.c_uint16),
        ("nan", ctypes.c_uint16),
    ]


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
    """As `jit.tensor_map`; refuses what cuTensorMapEncodeTiled refuses."""
    size, rank = _BYTES[dtype], len(sizes)
    wrong = [
        *([f"address {pointer:#x}"] if pointer % 16 else []),
        *(
            [f"rank {rank}"]
            if not 1 <= rank <= 5 or len(box) != rank or len(strides_bytes) != rank - 1
            else []
        ),
        *(f"size {n}" for n in sizes if not 0 < n <= 2**32),
        *(f"stride {n}" for n in strides_bytes if n % 16 or not 0 <= n < 2**40),
        *(f"box {n}" for n in box if not 0 < n <= 256),
        *([f"box of {box[0] * size} bytes a row"] if box[0] * size % 16 else []),
        *(
            [f"box of {box[0] * size} bytes a row in a swizzle of {swizzle}"]
            if 0 < swizzle < box[0] * size
            else []
        ),
    ]
    if wrong:
        raise DeviceError(
            f"no tensor map of {dtype} sizes {sizes}, strides {strides_bytes} B, box {box}: {wrong}"
        )
    found = TensorMap()
    made = _Map.from_buffer(found)
    made.pointer, made.element_bytes, made.rank, made.swizzle = pointer, size, rank, swizzle
    made.nan = out_of_bounds == "nan"
    for i in range(5):
        made.sizes[i], made.box[i] = (sizes[i], box[i]) if i < rank else (1, 1)
        made.strides[i] = size if i == 0 else strides_bytes[i - 1] if i < rank else 0
    return found


def moved(like: TensorMap, pointer: int) -> TensorMap:
    """As `jit.moved`; refuses what cuTensorMapReplaceAddress refuses."""
    if pointer % 16:
        raise DeviceError(f"no tensor map at {pointer:#x}")
    found = TensorMap.from_buffer_copy(like)
    _Map.from_buffer(found).pointer = pointer
    return found
