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
        kernel: "auto" for the fastest rung that fits, a rung's name, or several as
            "cuda_gemv,torch_linear": the first that fits.

    Returns:
        `[tokens, outputs]` of x's dtype.

    Raises:
        ProblemError: shapes, dtypes or devices that do not fit together.
        UnknownNameError, KernelRefusedError: as `ladder.choose`.
    """
    kinds = [(t.shape, t.dtype, t.device) for t in ((x, weight) if bias is None else (x, weight, bias))]
    problem, rung = _plan(kernel, *kinds)
    if x.is_cuda and not (x.is_contiguous() and weight.is_contiguous()):
        raise ProblemError("x or weight is not contiguous; supported on a GPU: contiguous ones")
    out = x.new_empty(problem.tokens, problem.outputs)
    if problem.tokens:
        rung.run(problem, x, weight, bias, out)
    return out


_Kind = tuple[torch.Size, torch.dtype, torch.device]


@lru_cache(maxsize=4096)
def _plan(
    kernel: str, x: _Kind, weight: _Kind, bias: _Kind | None = None
) -> tuple[LinearProblem, ladder.Rung]:
    """The problem of tensors of these kinds, checked, and the rung that runs it."""
    (shape, dtype, device), (weight_shape, *rest) = x, weight
    if len(shape) != 2 or len(weight_shape) != 2 or shape[1] != weight_shape[1]:
        raise ProblemError(
            f"x is {list(shape)}, weight {list(weight_shape)}; "
            "supported: [tokens, inputs] and [outputs, inputs]"
        )
    if [dtype, device] != rest or (bias is not None and bias[1:] != x[1:]):
        given = [f"{d} on {where}" for _, d, where in (x, weight, *([] if bias is None else [bias]))]
        raise ProblemError(f"x, weight and bias are {', '.join(given)}; supported: one dtype, one device")
    if bias is not None and bias[0] != weight_shape[:1]:
        raise ProblemError(f"bias is {list(bias[0])}; supported: [outputs], here {list(weight_shape[:1])}")
    arch = 0
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        arch = 10 * major + minor
    problem = LinearProblem(
        tokens=shape[0],
        inputs=shape[1],
        outputs=weight_shape[0],
        dtype=str(dtype).removeprefix("torch."),
        bias=bias is not None,
        device=device.type,
        arch=arch,
    )
    return problem, ladder.choose(problem, kernel)
