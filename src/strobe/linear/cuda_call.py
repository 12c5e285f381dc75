"""What the CUDA rungs of the matrix product share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from strobe.cuda import needs
from strobe.cuda.jit import SCALAR
from strobe.linear.problem import LinearProblem
from strobe.linear.projection import Projection

_MaybeTensor = TypeVar("_MaybeTensor", torch.Tensor, "torch.Tensor | None")


def refusals(problem: LinearProblem) -> list[str]:
    reasons = needs.refusals(problem.device, problem.arch)
    if problem.dtype not in SCALAR:
        reasons.append(f"dtype {problem.dtype}; supported: {', '.join(SCALAR)}")
    return reasons + [f"fuses no {what}" for what in problem.around]


def packed(rung: str, pack: Callable[..., Any], problem: LinearProblem, projection: Projection) -> Any:
    """`pack(problem, projection, programmatic=...)`, kept with the projection from then on.

    A programmatic launch reads weights before the kernels ahead have ended: what wrote them is waited for
    by a first launch that is none.
    """
    key = (rung, problem.tokens, problem.norm, problem.swiglu, problem.residual, problem.append)
    found = projection.scratch.get(key)
    if found is None:
        overlaps = problem.arch >= 90
        capturing = torch.cuda.is_current_stream_capturing()
        found = pack(problem, projection, programmatic=capturing and overlaps)
        projection.scratch[key] = pack(problem, projection, programmatic=overlaps)
    return found


def on_16_bytes(tensor: _MaybeTensor) -> _MaybeTensor:
    """The tensor, or a copy of one that begins between multiples of 16 bytes."""
    return tensor if tensor is None or tensor.data_ptr() % 16 == 0 else tensor.clone()


def constants(
    problem: LinearProblem, projection: Projection
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Weight, bias and norm as this problem has them, each from a multiple of 16 bytes on."""
    norm = projection.norm if problem.norm else None
    return on_16_bytes(projection.weight), on_16_bytes(projection.bias), on_16_bytes(norm)


def parameters(
    problem: LinearProblem, projection: Projection, bias: torch.Tensor | None, each: int
) -> dict[str, Any]:
    """The fields that the `Params` of cuda_skinny.cu and cuda_wgmma.cu share."""
    return {
        "bias": None if bias is None else bias.data_ptr(),
        "tokens": problem.tokens,
        "inputs": problem.inputs,
        "each": each,
        "residual": problem.residual,
        "norm_eps": projection.norm_eps,
    }
