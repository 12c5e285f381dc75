"""Softmax over the last dimension: torch's on a CPU, a CUDA kernel of our own on a GPU."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from strobe.cuda import jit
from strobe.ops import kernels

_SOURCE = Path(__file__).with_suffix(".cu")
_THREADS = 256


def softmax(x: torch.Tensor) -> torch.Tensor:
    """`exp(x) / Σ exp(x)` over the last dimension (docs/math.md, eq. 2), of x's shape and dtype.

    Computed in float32. A row of nothing but -inf gives 0, as a query that sees no key must.
    """
    if x.device.type != "cuda" or x.dtype not in kernels.SCALAR:
        return torch.softmax(x, dim=-1).masked_fill((x == float("-inf")).all(dim=-1, keepdim=True), 0.0)
    x = x.contiguous()
    out = torch.empty_like(x)
    if x.numel():
        kernel = jit.kernel(_SOURCE, "softmax", {"scalar_t": kernels.SCALAR[x.dtype]}, x.get_device())
        kernel(x.numel() // x.shape[-1], _THREADS, [x, out, ctypes.c_int(x.shape[-1])])
    return out


def sources(arch: str) -> list[jit.Source]:
    return [jit.Source(_SOURCE, {"scalar_t": scalar}) for scalar in kernels.SCALAR.values()]
