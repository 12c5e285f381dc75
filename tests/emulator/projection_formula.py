"""A projection by its formula, in float64."""

from __future__ import annotations

import torch

from strobe.linear import Projection


def formula(x: torch.Tensor, projection: Projection, residual: torch.Tensor | None) -> torch.Tensor:
    x = x.double()
    if projection.norm is not None:
        x = x / (x.square().mean(-1, keepdim=True) + projection.norm_eps).sqrt() * projection.norm.double()
    out = x @ projection.weight.double().t()
    if projection.bias is not None:
        out = out + projection.bias.double()
    if projection.swiglu:
        gate, up = out.chunk(2, dim=-1)
        out = gate / (1 + torch.exp(-gate)) * up
    return out if residual is None else out + residual.double()
