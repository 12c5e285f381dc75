"""The product on a CPU in tiles of registers, with all that stands around it, for any number of tokens.

Most checkpoints hold bfloat16. Their weights in float32 have sixteen zeros at their ends, which need not be
read: such a weight is kept in bfloat16 beside itself, in panels of columns that are read from end to end, and
widened, exactly, in the register. Other weights are read where they lie, which is good for few tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from strobe.cpu import jit, threads
from strobe.linear.problem import LinearProblem
from strobe.linear.projection import Projection, is_narrow

IDEA = "on a CPU: sums of a tile in registers, all around the product in the same loop, weights without zeros"

MOST_TOKENS = 8
"""Of a weight that bfloat16 does not hold: from there on oneDNN, which copies it into panels, is ahead."""
_KERNEL = "strobe.linear.numba_tiled_kernel"
_THREAD_WORK = 1 << 21
"""Least that is worth a thread of its own: weights, each counted 8 times for being read, and once a token."""


def refusals(problem: LinearProblem) -> list[str]:
    reasons = list(jit.refusals())
    if problem.device != "cpu":
        reasons.append(f"tensors on {problem.device}; needs a CPU")
    if problem.dtype != "float32":
        reasons.append(f"dtype {problem.dtype}; supported: float32")
    if problem.tokens > MOST_TOKENS and not problem.narrow:
        reasons.append(f"{problem.tokens} tokens; supported: {MOST_TOKENS}, or a weight that bfloat16 holds")
    if not problem.input_major:
        reasons.append("a weight that lies output by output; supported: as linear.empty_weight lays it")
    return reasons + [f"fuses no {what}" for what in problem.around if what == "append"]


def run(problem: LinearProblem, x: torch.Tensor, projection: Projection, out: torch.Tensor) -> None:
    fixed = projection.scratch.get(_KERNEL)
    if fixed is None or fixed.version != _version(projection.weight):
        fixed = projection.scratch[_KERNEL] = _Fixed.of(projection)
    numbers = fixed.address, x.data_ptr(), out.data_ptr(), problem.tokens
    around = problem.norm, problem.swiglu, problem.residual
    work = problem.inputs * problem.outputs * (8 + problem.tokens)
    threads.run(fixed.kernel, (*numbers, *around), threads.worth(work, _THREAD_WORK))


class _Fixed(NamedTuple):
    """What all calls of one projection share; `address` is that of `numbers`."""

    kernel: jit.Kernel
    address: int
    numbers: np.ndarray
    tensors: tuple[torch.Tensor | None, ...]
    """Those that `numbers` begins with the addresses of: the weight first."""
    version: int
    """Of the projection's weight: one that was written to is looked at again."""

    @classmethod
    def of(cls, projection: Projection) -> _Fixed:
        weight, version = projection.weight, _version(projection.weight)
        narrow = is_narrow(weight)
        read = _panels(weight.bfloat16(), 2 if projection.swiglu else 1) if narrow else weight
        eps = torch.tensor([projection.norm_eps], dtype=torch.float32)
        tensors = read, projection.bias, projection.norm, eps
        outputs, inputs = weight.shape
        numbers = np.array([*(0 if t is None else t.data_ptr() for t in tensors), inputs, outputs], np.int64)
        kernel = jit.kernels(_KERNEL).kernel(narrow)
        return cls(kernel, numbers.ctypes.data, numbers, tensors, version)


def _version(weight: torch.Tensor) -> int:
    """How often it was written to; inference_mode's tensors do not count."""
    return 0 if weight.is_inference() else weight._version


def _panels(weight: torch.Tensor, parts: int) -> torch.Tensor:
    """`[panels, inputs, PANEL]`: columns side by side, part by part (SwiGLU's gate and up), each filled up to
    whole tiles with zeros."""
    kernels = jit.kernels(_KERNEL)
    outputs, inputs = weight.shape
    columns, widest = outputs // parts, kernels.WIDEST
    filled = weight.new_zeros(parts, -(-columns // widest) * widest, inputs)
    filled[:, :columns] = weight.reshape(parts, columns, inputs)
    return filled.view(-1, kernels.PANEL, inputs).transpose(1, 2).contiguous()
