"""torch's own product: MKL on a CPU, cuBLAS on a GPU. Runs everything."""

from __future__ import annotations

import torch

from strobe.linear.problem import LinearProblem

IDEA = "torch.addmm: the vendor's library"


def refusals(problem: LinearProblem) -> list[str]:
    return []


def run(
    problem: LinearProblem,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)
