"""Small arrays to the device in one copy a step, and results back, without waiting for either.

Everything runs on the device's current stream, so that a step's copy, its kernels and the next step's copy
follow one another there. The host only takes care not to write what a copy may still read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch

BUFFERS = 3
"""Of the host, filled in turn: one is being filled, one copied, one belongs to a step that still waits."""
_ALIGN = 16
"""Bytes: kernels read in pieces of 16."""


class Event(Protocol):
    """A point in a stream's work."""

    def record(self) -> None: ...

    def synchronize(self) -> None: ...


class _OnStream:
    """In the stream that is current on its device, whichever device is current."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._event = torch.cuda.Event()

    def record(self) -> None:
        self._event.record(torch.cuda.current_stream(self._device))

    def synchronize(self) -> None:
        self._event.synchronize()


class _Always:
    """The event of a device that is ready by the time a call returns: a CPU."""

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


def event(device: torch.device) -> Event:
    return _OnStream(device) if device.type == "cuda" else _Always()


class Staging:
    """One block of memory on the device, and host buffers that are copied into it.

    The block begins with `drawn`, int64 `[head]`, which only the device writes: the tokens that the last
    step drew. `send` puts a step's arrays behind it. The block never moves, and arrays of the same shapes
    lie at the same places each time: a CUDA graph may hold their addresses.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        head: int,
        capacity: int,
        new_event: Callable[[torch.device], Event] = event,
    ) -> None:
        """`capacity` bytes are for the arrays of one step, alignment included."""
        self._start = _aligned(8 * head)
        size = self._start + _aligned(capacity)
        self._block = torch.zeros(size, dtype=torch.uint8, device=device)
        pinned = device.type == "cuda"
        self._buffers = [torch.empty(size, dtype=torch.uint8, pin_memory=pinned) for _ in range(BUFFERS)]
        self._copied = [new_event(device) for _ in range(BUFFERS)]
        self._turn = 0
        self.words = self._block.view(torch.int64)
        """The whole block: a step's token ids are picked from `drawn` and its own first array at once."""
        self.drawn = self.words[:head]

    @property
    def first_word(self) -> int:
        """Index in `words` of the first array's first element, where that is int64."""
        return self._start // 8

    def send(self, arrays: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """The arrays on the device, as views of the block that the next call overwrites."""
        turn = self._turn
        self._turn = (turn + 1) % BUFFERS
        self._copied[turn].synchronize()
        host, end = self._buffers[turn].numpy(), self._start
        places = []
        for array in arrays:
            places.append(end)
            host[end : end + array.nbytes] = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
            end = _aligned(end + array.nbytes)
        self._block[self._start : end].copy_(self._buffers[turn][self._start : end], non_blocking=True)
        self._copied[turn].record()
        return [
            self._block[place : place + array.nbytes].view(_DTYPES[array.dtype]).view(array.shape)
            for place, array in zip(places, arrays, strict=True)
        ]


def in_place(arrays: Sequence[np.ndarray]) -> list[torch.Tensor]:
    """What `Staging.send` comes to on a CPU that has nothing to overlap: the arrays' own memory."""
    return [torch.from_numpy(array) for array in arrays]


class Readback:
    """Copies of device tensors, on their way to the host. `wait` before reading what `copy` gave."""

    def __init__(self, device: torch.device) -> None:
        self._arrived = event(device)
        self._device = device

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor on the host, pinned by torch, whose values are there once `wait` returns."""
        if tensor.device.type == "cpu":
            return tensor.clone()  # the device may write the next step's over it
        return tensor.to("cpu", non_blocking=True)

    def sent(self) -> None:
        """All copies have been asked for."""
        self._arrived.record()

    def wait(self) -> None:
        self._arrived.synchronize()


class Tokens(NamedTuple):
    """What a step drew, int64 `[rows]`: on the device, and where the draw writes it, in a host's memory that
    is filled when the device has come so far."""

    on_device: torch.Tensor
    on_host: torch.Tensor | None = None


class Mailboxes:
    """Pinned tensors of the host, int64 `[rows]`, which kernels write: a step's is read before its turn
    comes again."""

    def __init__(self, rows: int) -> None:
        self._boxes = [torch.empty(rows, dtype=torch.int64, pin_memory=True) for _ in range(BUFFERS)]
        self._turn = 0

    def next(self, count: int) -> torch.Tensor:
        self._turn = (self._turn + 1) % BUFFERS
        return self._boxes[self._turn][:count]


_DTYPES = {np.dtype(np.int64): torch.int64, np.dtype(np.int32): torch.int32}


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def nbytes(shapes: Sequence[tuple[int, int]]) -> int:
    """Room that arrays of (elements, bytes an element) take in a `Staging`."""
    return sum(_aligned(count * size) for count, size in shapes)
