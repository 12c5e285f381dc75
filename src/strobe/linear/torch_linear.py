"""torch's own product: MKL on a CPU, cuBLAS on a GPU. Runs everything."""

from __future__ import annotations

import torch

from strobe.linear.problem import LinearProblem
from strobe.linear.projection import Projection

IDEA = "torch.addmm: the vendor's library"


def refusals(problem: LinearProblem) -> list[str]:
    return [f"fuses no {what}" for what in problem.around if what != "residual"]


def run(problem: LinearProblem, x: torch.Tensor, projection: Projection, out: torch.Tensor) -> None:
    weight, bias = projection.weight.t(), projection.bias
    if problem.residual:
        (out if bias is None else out.add_(bias)).addmm_(x, weight)
    elif bias is None:
        torch.mm(x, weight, out=out)
    else:
        torch.addmm(bias, x, weight, out=out)
