"""What the CUDA rungs of the matrix product share."""

from __future__ import annotations

from strobe.cuda import needs
from strobe.cuda.jit import SCALAR
from strobe.linear.problem import LinearProblem


def refusals(problem: LinearProblem) -> list[str]:
    reasons = needs.refusals(problem.device, problem.arch)
    if problem.dtype not in SCALAR:
        reasons.append(f"dtype {problem.dtype}; supported: {', '.join(SCALAR)}")
    return reasons + [f"fuses no {what}" for what in problem.around]
