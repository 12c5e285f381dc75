"""What this machine can do at most, measured: the roof that every figure is held against."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial

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

    The product is torch's in the dtype; on a CPU the fastest of it, float32's for 16 bits, and oneDNN's. The
    read is the faster of torch's sum and, on a GPU that has them, bulk copies.
    """
    n = 8192 if device == "cuda" else 1024
    makes = _products(getattr(torch, dtype), device)
    make = makes[0] if len(makes) == 1 else min(makes, key=lambda make: _fastest_ms(make(n // 4), device))
    product_ms = _fastest_ms(make(n), device)
    big = torch.randn((4 << 30 if device == "cuda" else 256 << 20) // 4, device=device)
    # a sum reads every byte once and writes next to nothing
    read_ms = _fastest_ms(lambda: big.sum(), device)
    if device == "cuda" and read.runs(gpu().arch, gpu().shared_memory_per_block):
        read_ms = min(read_ms, _bulk_ms(big))
    return Ceilings(dtype, 2 * n**3 / product_ms * 1e-9, big.nbytes / read_ms * 1e-6)


def _products(dtype: torch.dtype, device: str) -> list[Callable[[int], Callable[[], object]]]:
    """Ways to multiply two random matrices of a size: what kernels of this dtype may stand on."""

    def matmul(n: int, kind: torch.dtype = dtype) -> Callable[[], object]:
        return partial(torch.matmul, *_two(n, kind, device))

    def onednn(n: int) -> Callable[[], object]:
        return partial(
            torch.ops.mkldnn._linear_pointwise, *_two(n, torch.float32, device), None, "none", [], ""
        )

    ways: list[Callable[[int], Callable[[], object]]] = [matmul]
    if device == "cuda" or dtype == torch.float64:
        return ways
    if dtype != torch.float32:
        ways.append(partial(matmul, kind=torch.float32))
    if torch.backends.mkldnn.is_available():
        ways.append(onednn)
    return ways


def _two(n: int, kind: torch.dtype, device: str) -> list[torch.Tensor]:
    return [torch.randn(n, n, device=device).to(kind) for _ in range(2)]


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
