"""`linear.apply()`: describe the product, choose a rung, run it."""

from __future__ import annotations

from functools import lru_cache

import torch

from strobe.errors import ProblemError
from strobe.linear import ladder
from strobe.linear.problem import LinearProblem


def apply(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, kernel: str = "auto"
) -> torch.Tensor:
    """`x @ weightᵀ + bias`.

    Args:
        x: `[tokens, inputs]`, contiguous.
        weight: `[outputs, inputs]`, contiguous, of x's dtype.
        bias: `[outputs]` or None.
        kernel: a rung's name, or "auto" for the fastest that fits.

    Returns:
        `[tokens, outputs]` of x's dtype.

    Raises:
        ProblemError: shapes, dtypes or devices that do not fit together.
        UnknownNameError, KernelRefusedError: as `ladder.choose`.
    """
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ProblemError(
            f"x is {list(x.shape)}, weight {list(weight.shape)}; "
            "supported: [tokens, inputs] and [outputs, inputs]"
        )
    if x.dtype != weight.dtype or x.device != weight.device:
        raise ProblemError(
            f"x is {x.dtype} on {x.device}, weight {weight.dtype} on {weight.device}; supported: the same"
        )
    tokens, inputs = x.shape
    problem = _describe(tokens, inputs, weight.shape[0], x.dtype, bias is not None, x.device)
    out = x.new_empty(tokens, weight.shape[0])
    if tokens:
        ladder.choose(problem, kernel).run(problem, x, weight, bias, out)
    return out


@lru_cache(maxsize=4096)
def _describe(
    tokens: int, inputs: int, outputs: int, dtype: torch.dtype, bias: bool, device: torch.device
) -> LinearProblem:
    arch = 0
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        arch = 10 * major + minor
    return LinearProblem(tokens, inputs, outputs, str(dtype).removeprefix("torch."), bias, device.type, arch)
