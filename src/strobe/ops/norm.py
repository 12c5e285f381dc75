"""RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467, equation 4) and LayerNorm.

LayerNorm: Ba, Kiros and Hinton 2016, arXiv 1607.06450, equation 4.
"""

from __future__ import annotations

import ctypes
import math
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F

from strobe.cuda import jit
from strobe.ops import kernels

FASTEST_FIRST = ("cuda", "torch")
"""What `rms_norm(kernel="auto")` tries on a GPU."""

_SOURCE = Path(__file__).with_suffix(".cu")
_THREADS, _VECTORS_MAX = 256, 8


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`x / sqrt(mean(x²) + eps) * weight` over the last dimension, in float64."""
    wide = x.double()
    return (wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()).to(x.dtype)


def layer_norm_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    """`(x - mean) / sqrt(variance + eps) * weight + bias` over the last dimension, in float64."""
    wide = x.double()
    centred = wide - wide.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return (scaled * weight.double() + bias.double()).to(x.dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, *, kernel: str = "auto") -> torch.Tensor:
    """x `[..., n]`, weight `[n]` → like x. 16-bit inputs are summed in float32.

    One row on a CPU takes a dot product and two products: half the time of PyTorch's six small steps.
    On a GPU, `kernel` is "torch", "cuda" (a launch of our own, chained to the kernels around it), or
    "auto", the first of `FASTEST_FIRST` that fits.

    Raises:
        UnknownNameError, KernelRefusedError: as `kernels.choose`.
    """
    if x.device.type == "cpu" and kernel == "auto":
        if x.shape[0] == 1 and x.dim() == 2 and x.dtype is torch.float32:
            row = x[0]
            mean = torch.dot(row, row).item() / row.shape[0] + eps
            return (x * (mean**-0.5 if mean else math.inf)).mul_(weight)
    elif (launch := _plan(kernel, kernels.kind_of(x, weight), eps)) is not None:
        out = torch.empty_like(x)
        launch(x.data_ptr(), weight.data_ptr(), out.data_ptr())
        return out
    return F.rms_norm(x, weight.shape, weight, eps)


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """x `[..., n]`, weight and bias `[n]` → like x."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def sources(arch: str) -> list[jit.Source]:
    return [jit.Source(_SOURCE, _defines(dtype, 4096)) for dtype in kernels.SCALAR]


@lru_cache(kernels.PLANS)
def _plan(kernel: str, kind: kernels.Kind, eps: float) -> kernels.Prepared | None:
    """The CUDA kernel's launch for x of a kind, and None where torch is to run it."""

    def refused() -> list[str]:
        return _cuda_refusals(kind)

    chosen = kernels.choose("rms_norm", kernel, FASTEST_FIRST, torch=kernels.refuses_nothing, cuda=refused)
    if chosen == "torch" or not kind.rows:
        return None
    loaded = jit.kernel(_SOURCE, "rms_norm", _defines(kind.dtype, kind.columns), kind.device.index)
    args = [None, None, None, ctypes.c_int(kind.columns), ctypes.c_float(eps)]
    programmatic = kernels.programmatic(kind.device)
    return kernels.Prepared(loaded.prepare(kind.rows, _THREADS, args, programmatic=programmatic))


def _cuda_refusals(kind: kernels.Kind) -> list[str]:
    reasons = kernels.refusals(kind, kind.columns)
    if not reasons and _vectors(kind.dtype, kind.columns) > _VECTORS_MAX:
        most = _VECTORS_MAX * _THREADS * 16 // kind.dtype.itemsize
        reasons.append(f"rows of {kind.columns}; supported: up to {most}")
    return reasons


def _defines(dtype: torch.dtype, columns: int) -> dict[str, jit.Define]:
    return {"scalar_t": kernels.SCALAR[dtype], "VECTORS": _vectors(dtype, columns)}


def _vectors(dtype: torch.dtype, columns: int) -> int:
    """Of 16 bytes that a thread holds of a row."""
    return -(-columns * dtype.itemsize // (16 * _THREADS))
