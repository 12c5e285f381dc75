"""What small operations with a CUDA kernel of their own share: the choice, and what such a kernel takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from strobe.errors import KernelRefusedError, UnknownNameError

SCALAR = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32"}
"""A dtype's name in CUDA (types.cuh)."""


def choose(
    operation: str, kernel: str, fastest_first: Sequence[str], **refusals: Callable[[], list[str]]
) -> str:
    """The version named `kernel`; "auto" is the first of `fastest_first` that refuses nothing.

    Args:
        refusals: of each version there is, what tells why it cannot run this.

    Raises:
        UnknownNameError: there is no version of this name.
        KernelRefusedError: it cannot run this; each reason is in the message.
    """
    if kernel not in ("auto", *refusals):
        raise UnknownNameError.among(f"{operation} kernel", kernel, ["auto", *refusals])
    for name in fastest_first if kernel == "auto" else (kernel,):
        if not (reasons := refusals[name]()):
            return name
    raise KernelRefusedError(
        f"{operation} kernel {name!r} refuses: {'; '.join(reasons)}",
        hint="kernel='auto' takes one that fits",
    )


def refuses_nothing() -> list[str]:
    return []


def refusals(*tensors: torch.Tensor) -> list[str]:
    """Why kernels that move 16 bytes at a time cannot take these, whose last dimensions are rows' lengths."""
    first, reasons = tensors[0], []
    if not first.is_cuda:
        reasons.append(f"tensors on {first.device.type}; needs an NVIDIA GPU")
    elif torch.cuda.get_device_capability(first.device)[0] < 8:
        reasons.append("needs compute capability 8.0 and up")
    if first.dtype not in SCALAR or any(tensor.dtype != first.dtype for tensor in tensors):
        kinds = ", ".join(str(tensor.dtype) for tensor in tensors)
        reasons.append(f"dtypes {kinds}; supported: one of float16, bfloat16 and float32")
    elif any(tensor.data_ptr() % 16 or tensor.shape[-1] * tensor.itemsize % 16 for tensor in tensors):
        reasons.append(f"rows of {first.shape[-1]}; supported: whole pieces of 16 bytes, on 16 bytes")
    if not first.is_contiguous():
        reasons.append("not contiguous")
    return reasons


def programmatic(tensor: torch.Tensor) -> bool:
    """Whether kernels on its device can start ahead of their turn: that came with Hopper."""
    return torch.cuda.get_device_capability(tensor.device)[0] >= 9
