"""SwiGLU (Shazeer 2020, arXiv 2002.05202) and the tanh form of GELU.

GELU: Hendrycks and Gimpel 2016, arXiv 1606.08415, section 2.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def swiglu_reference(gate_up: torch.Tensor) -> torch.Tensor:
    """`gate * sigmoid(gate) * up`, in float64, then the input's dtype."""
    gate, up = gate_up.double().chunk(2, dim=-1)
    return (gate / (1 + torch.exp(-gate)) * up).to(gate_up.dtype)


def gelu_tanh_reference(x: torch.Tensor) -> torch.Tensor:
    """`x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x³)))`, in float64, then x's dtype."""
    wide = x.double()
    return (0.5 * wide * (1 + torch.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)))).to(x.dtype)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """`[..., 2n]`, the gate's n features first → `[..., n]`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """x of any shape → like x."""
    return F.gelu(x, approximate="tanh")
