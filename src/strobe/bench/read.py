"""Reading memory in bulk and doing nothing else: the read ceiling of a GPU that has bulk copies."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from strobe.cuda import jit
from strobe.device import gpu

PIECE = 16 << 10
STAGES = 8
_SOURCE = Path(__file__).with_suffix(".cu")
_DEFINES: dict[str, jit.Define] = {"PIECE": PIECE, "STAGES": STAGES}


class _Read(ctypes.Structure):
    """`Read` of read.cu."""

    _fields_ = [("data", ctypes.c_void_p), ("sum", ctypes.c_void_p), ("pieces", ctypes.c_int)]


def runs(arch: int, shared_bytes: int) -> bool:
    """Bulk copies came with Hopper."""
    return arch >= 90 and shared_bytes > PIECE * STAGES


def read_once(data: torch.Tensor, total: torch.Tensor) -> None:
    """Read all of `data`, of whole pieces, on the current stream.

    `total` int32 `[1]` gains the sum, modulo 2**32, of each piece's first four bytes.
    """
    device = data.get_device()
    params = _Read(data=data.data_ptr(), sum=total.data_ptr(), pieces=data.nbytes // PIECE)
    kernel = jit.kernel(_SOURCE, "read_once", _DEFINES, device)
    kernel(gpu(device).sm_count, 32, params, shared_bytes=PIECE * STAGES)


def first_words(data: torch.Tensor) -> int:
    """What one `read_once` of `data` adds to `total`, as a signed 32-bit number."""
    words = data.view(torch.int32).view(-1, PIECE // 4)[:, 0]
    total = int(words.long().sum()) & 0xFFFFFFFF
    return total - (1 << 32) if total >> 31 else total


def sources(arch: str) -> list[jit.Source]:
    return [jit.Source(_SOURCE, _DEFINES)] if jit.arch_number(arch) >= 90 else []
