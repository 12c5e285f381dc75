"""What small operations with a CUDA kernel of their own share: the choice, what such a kernel takes, and
launches that are packed once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Lock
from typing import NamedTuple

import torch

from strobe.cuda import jit
from strobe.errors import KernelRefusedError, UnknownNameError

SCALAR = {getattr(torch, name): scalar for name, scalar in jit.SCALAR.items()}
"""A dtype → its name in types.cuh."""
PLANS = 1024
"""Choices and packed launches that an operation keeps: of the kinds of input met last."""


class Kind(NamedTuple):
    """All that the choice of a kernel, and its launch but for addresses, depend on: of the first tensor,
    and of all the dtypes and whether they lie on 16 bytes."""

    shape: torch.Size
    device: torch.device
    contiguous: bool
    aligned: bool
    dtypes: tuple[torch.dtype, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.dtypes[0]

    @property
    def columns(self) -> int:
        return self.shape[-1]

    @property
    def rows(self) -> int:
        return self.shape[:-1].numel()


def kind_of(x: torch.Tensor, *others: torch.Tensor) -> Kind:
    addresses, dtypes = x.data_ptr(), [x.dtype]
    for other in others:
        addresses |= other.data_ptr()
        dtypes.append(other.dtype)
    return Kind(x.shape, x.device, x.is_contiguous(), not addresses % 16, tuple(dtypes))


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


def refusals(kind: Kind, *lengths: int) -> list[str]:
    """Why kernels that move 16 bytes at a time cannot take these, whose rows have these lengths."""
    reasons = []
    if kind.device.type != "cuda":
        reasons.append(f"tensors on {kind.device.type}; needs an NVIDIA GPU")
    elif torch.cuda.get_device_capability(kind.device)[0] < 8:
        reasons.append("needs compute capability 8.0 and up")
    if kind.dtype not in SCALAR or len(set(kind.dtypes)) > 1:
        kinds = ", ".join(map(str, kind.dtypes))
        reasons.append(f"dtypes {kinds}; supported: one of float16, bfloat16 and float32")
    elif not kind.aligned or any(length * kind.dtype.itemsize % 16 for length in lengths):
        reasons.append(f"rows of {kind.columns}; supported: whole pieces of 16 bytes, on 16 bytes")
    if not kind.contiguous:
        reasons.append("not contiguous")
    return reasons


def programmatic(device: torch.device) -> bool:
    """Whether kernels there can start ahead of their turn: that came with Hopper."""
    return torch.cuda.get_device_capability(device)[0] >= 9


class Prepared:
    """A packed launch whose first arguments are addresses, which each call names; for several threads."""

    def __init__(self, launch: jit.Launch) -> None:
        self._launch = launch
        self._lock = Lock()

    def __call__(self, *addresses: int) -> None:
        with self._lock:
            for argument, address in zip(self._launch.args, addresses, strict=False):
                argument.value = address
            self._launch()
