"""Weights to their places, piece by piece: into a GPU through pinned memory, elsewhere directly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

PIECE_BYTES = 32 << 20
"""Copied at a time: bounds what a change of dtype takes on the host."""

TILE_BYTES = 1 << 18
"""Copied at a time into a transposed place on the host: they stay in the processor's cache."""

BUFFERS = 3
"""Pinned, of a piece each: one is being filled by the processor's threads while the bus reads another."""


class Copy(Protocol):
    def __call__(self, to: torch.Tensor, tensor: torch.Tensor) -> None:
        """Fill `to` with a host tensor of the same shape, in the dtype of `to`."""


@contextmanager
def copying(device: torch.device | str) -> Iterator[Copy]:
    """A `Copy` onto the device; all that it was given is there when the context ends."""
    target = torch.device(device)
    if target.type != "cuda":
        yield _copy
        return
    with torch.cuda.device(target):
        yield _Upload()
        torch.cuda.synchronize(target)


def _pieces(
    to: torch.Tensor, tensor: torch.Tensor, piece_bytes: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    rows = max(1, piece_bytes // max(1, to[:1].numel() * to.element_size()))
    return zip(to.split(rows), tensor.split(rows), strict=True)


def _copy(to: torch.Tensor, tensor: torch.Tensor) -> None:
    for place, piece in _pieces(to, tensor, PIECE_BYTES if to.is_contiguous() else TILE_BYTES):
        place.copy_(piece)


class _Upload:
    """Onto the current GPU, on its current stream.

    A copy out of a mapped file waits for each page of it; torch's threads fill a buffer together, and the bus
    reads pinned memory without the processor.
    """

    def __init__(self) -> None:
        self._buffers = [torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(BUFFERS)]
        self._read = [torch.cuda.Event() for _ in range(BUFFERS)]
        self._turn = 0

    def __call__(self, to: torch.Tensor, tensor: torch.Tensor) -> None:
        for place, piece in _pieces(to, tensor, PIECE_BYTES):
            if place.nbytes > PIECE_BYTES:
                place.copy_(piece)
                continue
            read = self._read[self._turn]
            read.synchronize()
            buffer = self._buffers[self._turn][: place.nbytes].view(place.dtype).view(place.shape)
            buffer.copy_(piece)
            place.copy_(buffer, non_blocking=True)
            read.record()
            self._turn = (self._turn + 1) % BUFFERS
