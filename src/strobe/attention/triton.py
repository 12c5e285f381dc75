"""What the Triton rungs share: where they run."""

from __future__ import annotations

import importlib.util
import os
from functools import cache

from strobe.attention.problem import AttentionProblem
from strobe.cuda import needs


def refusals(problem: AttentionProblem) -> list[str]:
    """Why Triton cannot run this: on NVIDIA GPUs, and slowly, for tests, on a CPU with TRITON_INTERPRET=1."""
    reasons = [] if _installed() else ["triton is not installed (pip install triton)"]
    if problem.device != "cpu":
        return reasons + needs.refusals(problem.device, problem.arch)
    if os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
        reasons.append("tensors on cpu; needs an NVIDIA GPU, or TRITON_INTERPRET=1")
    elif problem.dtype != "float16":
        reasons.append(f"dtype {problem.dtype} interpreted; supported: float16")
    return reasons


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None
