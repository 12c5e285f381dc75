"""SwiGLU (Shazeer 2020, arXiv 2002.05202) and the tanh form of GELU.

GELU: Hendrycks and Gimpel 2016, arXiv 1606.08415, section 2.
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
"""What `swiglu(kernel="auto")` tries on a GPU."""

_SOURCE = Path(__file__).with_suffix(".cu")
_THREADS = 256


def swiglu_reference(gate_up: torch.Tensor) -> torch.Tensor:
    """`gate * sigmoid(gate) * up`, in float64, then the input's dtype."""
    gate, up = gate_up.double().chunk(2, dim=-1)
    return (gate / (1 + torch.exp(-gate)) * up).to(gate_up.dtype)


def gelu_tanh_reference(x: torch.Tensor) -> torch.Tensor:
    """`x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x³)))`, in float64, then x's dtype."""
    wide = x.double()
    return (0.5 * wide * (1 + torch.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)))).to(x.dtype)


def swiglu(gate_up: torch.Tensor, *, kernel: str = "auto") -> torch.Tensor:
    """`[..., 2n]`, the gate's n features first → `[..., n]`.

    On a GPU, `kernel` is "torch", "cuda" (a launch of our own, chained to the kernels around it), or
    "auto", the first of `FASTEST_FIRST` that fits.

    Raises:
        UnknownNameError, KernelRefusedError: as `kernels.choose`.
    """
    if gate_up.device.type != "cpu" or kernel != "auto":
        launch = _plan(kernel, kernels.kind_of(gate_up))
        if launch is not None:
            out = gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))
            launch(gate_up.data_ptr(), out.data_ptr())
            return out
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """x of any shape → like x."""
    return F.gelu(x, approximate="tanh")


def sources(arch: str) -> list[jit.Source]:
    return [jit.Source(_SOURCE, {"scalar_t": scalar}) for scalar in kernels.SCALAR.values()]


@lru_cache(kernels.PLANS)
def _plan(kernel: str, kind: kernels.Kind) -> kernels.Prepared | None:
    """The CUDA kernel's launch for an input of a kind, and None where torch is to run it."""
    columns = kind.columns // 2

    def refused() -> list[str]:
        return kernels.refusals(kind, columns)

    chosen = kernels.choose("swiglu", kernel, FASTEST_FIRST, torch=kernels.refuses_nothing, cuda=refused)
    if chosen == "torch" or not kind.rows:
        return None
    loaded = jit.kernel(_SOURCE, "swiglu", {"scalar_t": kernels.SCALAR[kind.dtype]}, kind.device.index)
    vectors = kind.rows * columns * kind.dtype.itemsize // 16
    args = [None, None, ctypes.c_int(columns), ctypes.c_int(vectors)]
    programmatic = kernels.programmatic(kind.device)
    return kernels.Prepared(
        loaded.prepare(-(-vectors // _THREADS), _THREADS, args, programmatic=programmatic)
    )
