"""The same bits for a token whatever tokens are beside it: `--deterministic` takes this.

A library chooses how to cut and to add up a product by its sizes, so that a token's sum may round otherwise
in a batch of 5 than in one of 50. Here it is always asked for the same size: tokens go in tiles, the last one
filled up with zeros. What a token costs alone is little more, since its weights are read all the same; many
tiles read the weights many times.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from strobe.linear.problem import LinearProblem
from strobe.linear.projection import Projection
from strobe.ops.activation import swiglu
from strobe.ops.norm import rms_norm

IDEA = "torch.addmm of one fixed number of tokens, again and again: a token's bits do not hang on its company"

TILE = {"cpu": 8, "cuda": 128}
"""Tokens at a time. 128 is where a GPU's tensor cores take about as long as its memory."""


def refusals(problem: LinearProblem) -> list[str]:
    if problem.device not in TILE:
        return [f"tensors on {problem.device}; supported: {', '.join(TILE)}"]
    return [f"fuses no {what}" for what in problem.around if what == "append"]


def run(problem: LinearProblem, x: torch.Tensor, projection: Projection, out: torch.Tensor) -> None:
    weight, bias, tile = projection.weight.t(), projection.bias, TILE[problem.device]
    for start in range(0, problem.tokens, tile):
        part = x[start : start + tile]
        count = len(part)
        if count < tile:
            part = F.pad(part, (0, 0, 0, tile - count))
        if problem.norm and projection.norm is not None:
            part = rms_norm(part, projection.norm, projection.norm_eps)
        product = torch.mm(part, weight) if bias is None else torch.addmm(bias, part, weight)
        if problem.swiglu:
            product = swiglu(product)
        if problem.residual:
            out[start : start + count] += product[:count]
        else:
            out[start : start + count] = product[:count]
