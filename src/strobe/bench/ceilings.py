"""What this machine can do at most, measured: the roof that every figure is held against."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cache

import torch

from strobe.bench.timer import measure


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
    """Measure once a process: random data, the fastest of many runs, since nothing should pass a ceiling."""
    n = 8192 if device == "cuda" else 1024
    kind = getattr(torch, dtype)
    a, b = (torch.randn(n, n, device=device).to(kind) for _ in range(2))
    product = measure(lambda: a @ b, device, budget_ms=300)
    big = torch.randn((4 << 30 if device == "cuda" else 256 << 20) // 4, device=device)
    # a sum reads every byte once and writes next to nothing
    read = measure(lambda: big.sum(), device, budget_ms=300)
    return Ceilings(dtype, 2 * n**3 / product.ms_min * 1e-9, big.numel() * 4 / read.ms_min * 1e-6)
