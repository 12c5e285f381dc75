"""RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467, equation 4) and LayerNorm.

LayerNorm: Ba, Kiros and Hinton 2016, arXiv 1607.06450, equation 4.
"""

from __future__ import annotations

import ctypes
import math
from pathlib import Path

import torch
import torch.nn.functional as F

from strobe.cuda import jit
from strobe.ops import kernels

FASTEST_FIRST = ("torch",)
"""What `rms_norm(kernel="auto")` tries on a GPU. "cuda", which has not been timed, is there by name."""

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
    elif _chosen(kernel, x, weight) == "cuda":
        return _launch(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """x `[..., n]`, weight and bias `[n]` → like x."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def sources(arch: str) -> list[jit.Source]:
    return [jit.Source(_SOURCE, _defines(dtype, 4096)) for dtype in kernels.SCALAR]


def _chosen(kernel: str, x: torch.Tensor, weight: torch.Tensor) -> str:
    def refused() -> list[str]:
        return _cuda_refusals(x, weight)

    return kernels.choose("rms_norm", kernel, FASTEST_FIRST, torch=kernels.refuses_nothing, cuda=refused)


def _cuda_refusals(x: torch.Tensor, weight: torch.Tensor) -> list[str]:
    reasons = kernels.refusals(x, weight)
    if not reasons and _vectors(x.dtype, x.shape[-1]) > _VECTORS_MAX:
        reasons.append(
            f"rows of {x.shape[-1]}; supported: up to {_VECTORS_MAX * _THREADS * 16 // x.itemsize}"
        )
    return reasons


def _launch(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    out, columns = torch.empty_like(x), x.shape[-1]
    if x.numel():
        launch = jit.kernel(_SOURCE, "rms_norm", _defines(x.dtype, columns), x.get_device())
        args = [x, weight, out, ctypes.c_int(columns), ctypes.c_float(eps)]
        launch(x.numel() // columns, _THREADS, args, programmatic=kernels.programmatic(x))
    return out


def _defines(dtype: torch.dtype, columns: int) -> dict[str, jit.Define]:
    return {"scalar_t": kernels.SCALAR[dtype], "VECTORS": _vectors(dtype, columns)}


def _vectors(dtype: torch.dtype, columns: int) -> int:
    """Of 16 bytes that a thread holds of a row."""
    return -(-columns * dtype.itemsize // (16 * _THREADS))
