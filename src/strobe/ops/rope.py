"""Rotary positions (Su et al. 2021, arXiv 2104.09864, equation 34), pairs half a head apart.

Feature i and feature `i + head_dim/2` of a head are one pair, turned by `position * frequencies[i]`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def rotate_reference(x: torch.Tensor, positions: torch.Tensor, frequencies: Sequence[float]) -> torch.Tensor:
    """x `[tokens, heads, head_dim]`: each pair, a complex number, times `exp(i * position * frequency)`."""
    first, second = x.double().chunk(2, dim=-1)
    frequency = torch.tensor(frequencies, dtype=torch.float64, device=x.device)
    angle = positions.double()[:, None, None] * frequency
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((turned.real, turned.imag), dim=-1).to(x.dtype)


def signed(frequencies: Sequence[float], device: torch.device | str) -> torch.Tensor:
    """float32 `[1, 1, head_dim]`: the frequencies negated, then as they are.

    One product with the positions, one cos and one sin then give all that `rotate` multiplies by:
    cos(-a) = cos(a), and sin(-a) = -sin(a) is the sign of the first half.
    """
    turn = torch.tensor(frequencies, dtype=torch.float32, device=device)
    return torch.cat((-turn, turn))[None, None]


def angles(
    positions: torch.Tensor, signed_frequencies: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin `[tokens, 1, head_dim]` of int64 positions `[tokens]`, computed in float32."""
    angle = positions[:, None, None] * signed_frequencies
    if angle.device.type == "cpu":  # torch's functions would wake its threads for a few hundred numbers
        cos, sin = (torch.from_numpy(function(angle.numpy())) for function in (np.cos, np.sin))
        return cos.to(dtype), sin.to(dtype)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x `[tokens, heads, head_dim]`, cos and sin from `angles` → like x."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)
