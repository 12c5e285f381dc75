"""`linear.apply()`: describe the product, choose a rung, run it."""

from __future__ import annotations

from functools import lru_cache

import torch

from strobe.errors import ProblemError
from strobe.linear import ladder
from strobe.linear.problem import LinearProblem


def empty_weight(
    outputs: int, inputs: int, *, device: torch.device | str, dtype: torch.dtype
) -> torch.Tensor:
    """An uninitialised weight `[outputs, inputs]`, laid out as its device multiplies it fastest.

    A GPU's lies output by output, contiguous. A CPU's lies input by input: one token's product then
    adds up rows of memory in order instead of taking a dot product a row, which was 1.4 times as fast
    (float32, 256 to 1408 features, one core), and no slower for many tokens.
    """
    if torch.device(device).type == "cpu":
        return torch.empty(inputs, outputs, device=device, dtype=dtype).t()
    return torch.empty(outputs, inputs, device=device, dtype=dtype)


def apply(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, kernel: str = "auto"
) -> torch.Tensor:
    """`x @ weightᵀ + bias`.

    Args:
        x: `[tokens, inputs]`, contiguous.
        weight: `[outputs, inputs]` of x's dtype; contiguous on a GPU, in any layout on a CPU.
        bias: `[outputs]` or None.
        kernel: a rung's name, or "auto" for the fastest that fits.

    Returns:
        `[tokens, outputs]` of x's dtype.

    Raises:
        ProblemError: shapes, dtypes or devices that do not fit together.
        UnknownNameError, KernelRefusedError: as `ladder.choose`.
    """
    problem, rung = _plan(
        x.shape, weight.shape, x.dtype, weight.dtype, (x.device, weight.device), bias is None, kernel
    )
    out = x.new_empty(problem.tokens, problem.outputs)
    if problem.tokens:
        rung.run(problem, x, weight, bias, out)
    return out


@lru_cache(maxsize=4096)
def _plan(
    x: torch.Size,
    weight: torch.Size,
    x_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    devices: tuple[torch.device, torch.device],
    no_bias: bool,
    kernel: str,
) -> tuple[LinearProblem, ladder.Rung]:
    """The problem of tensors of these kinds, checked, and the rung that runs it."""
    if len(x) != 2 or len(weight) != 2 or x[1] != weight[1]:
        raise ProblemError(
            f"x is {list(x)}, weight {list(weight)}; supported: [tokens, inputs] and [outputs, inputs]"
        )
    if x_dtype != weight_dtype or devices[0] != devices[1]:
        raise ProblemError(
            f"x is {x_dtype} on {devices[0]}, weight {weight_dtype} on {devices[1]}; supported: the same"
        )
    arch = 0
    if devices[0].type == "cuda":
        major, minor = torch.cuda.get_device_capability(devices[0])
        arch = 10 * major + minor
    dtype = str(x_dtype).removeprefix("torch.")
    problem = LinearProblem(x[0], x[1], weight[0], dtype, not no_bias, devices[0].type, arch)
    return problem, ladder.choose(problem, kernel)
