"""A projection of random numbers, and what it gives by its formula in float64."""

from __future__ import annotations

import torch

from strobe.linear import Projection


def around_a_product(
    inputs: int,
    columns: int,
    dtype: torch.dtype,
    *,
    biased: bool,
    normed: bool,
    swiglu: bool,
    device: str = "cpu",
) -> Projection:
    rows = 2 * columns if swiglu else columns
    return Projection(
        (torch.randn(rows, inputs, device=device) * inputs**-0.5).to(dtype),
        bias=torch.randn(rows, device=device).to(dtype) if biased else None,
        norm=(torch.rand(inputs, device=device) + 0.5).to(dtype) if normed else None,
        norm_eps=1e-5,
        swiglu=swiglu,
    )


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
