"""What this machine can do at most, measured: the roof that every figure is held against."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache

import torch

from strobe.bench import read
from strobe.bench.timer import clock
from strobe.device import gpu
from strobe.errors import DeviceError

_REST_S = 0.1
_BURSTS = 8


@dataclass(frozen=True)
class Ceilings:
    """`matmul_tflops` of a large matrix product in the dtype, `read_gbps` of a large read."""

    dtype: str
    matmul_tflops: float
    read_gbps: float

    def as_dict(self) -> dict[str, float | str]:
        return asdict(self)


@cache
def ceilings(device: str, dtype: str) -> Ceilings:
    """Measure once a process: random data, the fastest of many runs, since nothing should pass a ceiling.

    The product is the dtype's; on a CPU, of a 16-bit dtype, float32's where that is faster. The read is the
    faster of torch's sum and, on a GPU that has them, bulk copies.
    """
    n = 8192 if device == "cuda" else 1024
    kind = getattr(torch, dtype)
    if device == "cpu" and kind.itemsize == 2:  # kernels may work in float32, many times as fast on some
        kinds = {kind, torch.float32}
        kind = min(kinds, key=lambda kind: _fastest_ms(_product(n // 4, kind, device), device))
    product_ms = _fastest_ms(_product(n, kind, device), device)
    big = torch.randn((4 << 30 if device == "cuda" else 256 << 20) // 4, device=device)
    # a sum reads every byte once and writes next to nothing
    read_ms = _fastest_ms(lambda: big.sum(), device)
    if device == "cuda" and read.runs(gpu().arch, gpu().shared_memory_per_block):
        read_ms = min(read_ms, _bulk_ms(big))
    return Ceilings(dtype, 2 * n**3 / product_ms * 1e-9, big.nbytes / read_ms * 1e-6)


def _product(n: int, kind: torch.dtype, device: str) -> Callable[[], object]:
    a, b = (torch.randn(n, n, device=device).to(kind) for _ in range(2))
    return lambda: a @ b


def _bulk_ms(data: torch.Tensor) -> float:
    total = torch.zeros(1, dtype=torch.int32, device=data.device)
    read.read_once(data, total)
    if int(total) != read.first_words(data):
        raise DeviceError("the kernel that measures the read ceiling did not read everything")
    return _fastest_ms(lambda: read.read_once(data, total), "cuda")


def _fastest_ms(call: Callable[[], object], device: str) -> float:
    """The fastest of short bursts with rests between: a GPU under a long load slows to its power limit."""
    timed = clock(call, device)
    timed.times(2)
    found = []
    for _ in range(_BURSTS):
        if device == "cuda":
            time.sleep(_REST_S)
        found += timed.times(3)
    return min(found)
