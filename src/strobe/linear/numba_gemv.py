"""A few tokens' product on a CPU at its memory's bandwidth, with all that stands around it.

Most checkpoints hold bfloat16. Their weights in float32 have sixteen zeros at their ends, which need not be
read: such a weight is kept in bfloat16 beside itself, and widened, exactly, in the register.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from strobe.cpu import jit, threads
from strobe.linear.problem import LinearProblem
from strobe.linear.projection import Projection

IDEA = "few tokens on a CPU: all around the product in one compiled loop, weights read once and without zeros"

MOST_TOKENS = 16
_KERNEL = "strobe.linear.numba_gemv_kernel"
_NARROWED_BYTES = 1 << 26
"""Larger weights are not kept twice: their users count on the memory."""
_THREAD_BYTES = 1 << 22
"""Least of the weight that is worth a thread of its own."""


def refusals(problem: LinearProblem) -> list[str]:
    reasons = list(jit.refusals())
    if problem.device != "cpu":
        reasons.append(f"tensors on {problem.device}; needs a CPU")
    if problem.dtype != "float32":
        reasons.append(f"dtype {problem.dtype}; supported: float32")
    if problem.tokens > MOST_TOKENS:
        reasons.append(f"{problem.tokens} tokens; supported: up to {MOST_TOKENS}")
    if not problem.input_major:
        reasons.append("a weight that lies output by output; supported: as linear.empty_weight lays it")
    return reasons


def run(problem: LinearProblem, x: torch.Tensor, projection: Projection, out: torch.Tensor) -> None:
    fixed = projection.scratch.get(_KERNEL)
    if fixed is None or fixed.version != _version(projection.weight):
        fixed = projection.scratch[_KERNEL] = _Fixed.of(projection)
    call = partial(
        fixed.project,
        fixed.address,
        projection.norm_eps,
        x.data_ptr(),
        out.data_ptr(),
        problem.tokens,
        problem.norm,
        problem.swiglu,
        problem.residual,
    )
    if fixed.threads == 1:
        call(0, problem.columns)
    else:
        threads.run(call, threads.parts(problem.columns, fixed.threads))


class _Fixed(NamedTuple):
    """What all calls of one projection share; `address` is that of `numbers`."""

    project: Callable[..., None]
    address: int
    numbers: np.ndarray
    weight: torch.Tensor
    version: int
    """Of the weight: one that was written to is looked at again."""
    threads: int
    """Most that the weight is worth."""

    @classmethod
    def of(cls, projection: Projection) -> _Fixed:
        weight = _narrowed(projection.weight)
        tensors = [0 if t is None else t.data_ptr() for t in (weight, projection.bias, projection.norm)]
        outputs, inputs = weight.shape
        narrow = weight.dtype == torch.bfloat16
        numbers = np.array([*tensors, inputs, outputs, narrow], dtype=np.int64)
        worth = max(1, weight.nbytes // _THREAD_BYTES)
        project = jit.kernels(_KERNEL).project
        return cls(project, numbers.ctypes.data, numbers, weight, _version(projection.weight), worth)


def _version(weight: torch.Tensor) -> int:
    """How often it was written to; inference_mode's tensors do not count."""
    return 0 if weight.is_inference() else weight._version


def _narrowed(weight: torch.Tensor) -> torch.Tensor:
    """The weight in bfloat16 where that loses nothing, else itself."""
    if weight.nbytes > _NARROWED_BYTES or weight.is_inference():
        return weight
    narrow = weight.bfloat16()
    return narrow if torch.equal(narrow.float(), weight) else weight
