"""A kernel's answer, written over NaN and held against the formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from strobe.attention.api import empty_lse
from strobe.attention.cases import Inputs
from strobe.attention.check import Verdict, verdict


def judged(run: Callable[..., Any], inputs: Inputs) -> Verdict:
    """`run(problem, q, k, v, out, lse)`, as a rung's module has it."""
    problem, q, k, v = inputs.problem, inputs.q, inputs.k, inputs.v
    out = torch.full_like(q, float("nan"))
    lse = empty_lse(problem, q).fill_(float("nan"))
    run(problem, q, k, v, out, lse)
    return verdict(problem, q, k, v, out, lse)
