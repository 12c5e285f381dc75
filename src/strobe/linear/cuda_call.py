"""What the CUDA rungs of the matrix product share."""

from __future__ import annotations

from strobe.cuda.jit import SCALAR
from strobe.linear.problem import LinearProblem


def refusals(problem: LinearProblem) -> list[str]:
    reasons = []
    if problem.device != "cuda":
        reasons.append(f"tensors on {problem.device}; needs an NVIDIA GPU")
    elif problem.arch < 80:
        reasons.append(f"compute capability {problem.arch / 10}; supported: 8.0 and up")
    if problem.dtype not in SCALAR:
        reasons.append(f"dtype {problem.dtype}; supported: {', '.join(SCALAR)}")
    return reasons + [f"fuses no {what}" for what in problem.around]
