"""A matrix-vector product at the memory's bandwidth: decode at batch 1 lives here."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from strobe.cuda import jit
from strobe.linear import cuda_call
from strobe.linear.problem import LinearProblem
from strobe.linear.projection import Projection

IDEA = "a warp two outputs, weights read once in 16-byte loads with many in flight"

_SOURCE = Path(__file__).with_suffix(".cu")
_TOKENS_MAX = 8
_WARPS, _ROWS = 2, 2  # measured: small blocks leave no tail, two rows share what they read of x


def refusals(problem: LinearProblem) -> list[str]:
    reasons = cuda_call.refusals(problem)
    if problem.tokens > _TOKENS_MAX:
        reasons.append(f"{problem.tokens} tokens; supported: up to {_TOKENS_MAX}")
    if problem.inputs % 8:
        reasons.append(f"inputs {problem.inputs}; supported: multiples of 8")
    return reasons


def run(problem: LinearProblem, x: torch.Tensor, projection: Projection, out: torch.Tensor) -> None:
    x, weight = cuda_call.on_16_bytes(x), cuda_call.on_16_bytes(projection.weight)
    multiply = jit.kernel(_SOURCE, "multiply", _defines(problem.dtype, problem.tokens), x.get_device())
    sizes = (ctypes.c_int(problem.inputs), ctypes.c_int(problem.outputs))
    multiply(-(-problem.outputs // (_WARPS * _ROWS)), 32 * _WARPS, [x, weight, projection.bias, out, *sizes])


def sources(arch: str) -> list[jit.Source]:
    return [jit.Source(_SOURCE, _defines(dtype, 1)) for dtype in jit.SCALAR]


def _defines(dtype: str, tokens: int) -> dict[str, jit.Define]:
    return {"scalar_t": jit.SCALAR[dtype], "TOKENS": tokens, "WARPS": _WARPS, "ROWS": _ROWS}
