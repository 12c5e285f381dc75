"""A matrix product with tiles in shared memory and 4 x 4 outputs a thread."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from strobe.cuda import jit
from strobe.linear import cuda_call
from strobe.linear.problem import LinearProblem
from strobe.linear.projection import Projection

IDEA = "64 x 64 outputs a block, operands through shared memory, 4 x 4 outputs a thread"

_SOURCE = Path(__file__).with_suffix(".cu")
_TILE, _THREADS = 64, 256
_TOKENS_MAX = 65535 * _TILE  # the grid's second dimension


def refusals(problem: LinearProblem) -> list[str]:
    reasons = cuda_call.refusals(problem)
    if problem.tokens > _TOKENS_MAX:
        reasons.append(f"{problem.tokens} tokens; supported: up to {_TOKENS_MAX}")
    return reasons


def run(problem: LinearProblem, x: torch.Tensor, projection: Projection, out: torch.Tensor) -> None:
    multiply = jit.kernel(_SOURCE, "multiply", _defines(problem.dtype), x.get_device())
    sizes = (ctypes.c_int(n) for n in (problem.tokens, problem.inputs, problem.outputs))
    grid = (-(-problem.outputs // _TILE), -(-problem.tokens // _TILE))
    multiply(grid, _THREADS, [x, projection.weight, projection.bias, out, *sizes])


def sources(arch: str) -> list[jit.Source]:
    return [jit.Source(_SOURCE, _defines(dtype)) for dtype in jit.SCALAR]


def _defines(dtype: str) -> dict[str, jit.Define]:
    return {"scalar_t": jit.SCALAR[dtype]}
