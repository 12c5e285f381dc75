"""Stand-ins for what `strobe.cuda.jit` gives: `kernel`, Kernel and Launch of the same signatures."""

from __future__ import annotations

import ctypes
import re
import weakref
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cuda_emulator import build
from strobe.cuda.launch import Dim, _argument, _dim3
from strobe.cuda.nvrtc import Define


class EmulationError(Exception):
    """A kernel did what it must not: the message says what, which thread, and where in the sources."""


class Buffers:
    """The memory that kernels may touch: tensors whose address was asked for, as far as elements reach."""

    def __init__(self) -> None:
        self._held: list[torch.Tensor] = []
        self._older: list[weakref.ref[torch.Tensor]] = []

    def add(self, tensor: torch.Tensor) -> None:
        """Remember a tensor, and keep it: its memory must not become another's."""
        self._held.append(tensor)

    def let_go(self) -> None:
        """Keep no tensor alive any more; those that others keep still count."""
        self._older = [ref for ref in self._older if ref() is not None] + [weakref.ref(x) for x in self._held]
        self._held = []

    def extents(self) -> list[tuple[int, int]]:
        """First byte and end of each, ascending; those that overlap or touch are one."""
        older = [tensor for ref in self._older if (tensor := ref()) is not None]
        found: list[tuple[int, int]] = []
        for begin, end in sorted({_extent(tensor) for tensor in (*older, *self._held) if tensor.numel()}):
            if found and begin <= found[-1][1]:
                found[-1] = (found[-1][0], max(end, found[-1][1]))
            else:
                found.append((begin, end))
        return found


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    reach = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    begin = tensor.untyped_storage().data_ptr() + tensor.storage_offset() * tensor.element_size()
    return begin, begin + reach * tensor.element_size()


class Traces:
    """What the kernel launched last did to each byte of memory, in flags of state.h."""

    def __init__(self) -> None:
        self._last: list[tuple[int, np.ndarray]] = []

    def forget(self) -> None:
        self._last = []

    def of(self, extents: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """For the next launch to write to: of these extents, with what that kernel did as the one ahead."""
        found = [np.zeros(end - begin, np.uint8) for begin, end in extents]
        for at, trace in self._last:
            if not trace.any():
                continue
            for (begin, end), now in zip(extents, found, strict=True):
                first, last = max(at, begin), min(at + len(trace), end)
                if first < last:
                    now[first - begin : last - begin] = trace[first - at : last - at] >> 2
        self._last = [(begin, trace) for (begin, _), trace in zip(extents, found, strict=True)]
        return found


buffers = Buffers()
traces = Traces()
last_block_first = False


class _Launch(ctypes.Structure):
    """`Launch` of state.h."""

    _fields_ = [
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("cluster", ctypes.c_uint32 * 3),
        ("shared_bytes", ctypes.c_uint32),
        ("arguments_count", ctypes.c_int32),
        ("buffers_count", ctypes.c_int32),
        ("last_block_first", ctypes.c_int32),
        ("programmatic", ctypes.c_int32),
        ("arguments", ctypes.c_void_p),
        ("argument_sizes", ctypes.c_void_p),
        ("buffers", ctypes.c_void_p),
        ("traces", ctypes.c_void_p),
    ]


class Launch:
    """As strobe.cuda.launch.Launch: packed once, run at each call."""

    def __init__(
        self,
        kernel: Kernel,
        grid: Dim,
        block: Dim,
        args: ctypes.Structure | Sequence[Any],
        *,
        shared_bytes: int = 0,
        cluster: Dim | None = None,
        programmatic: bool = False,
    ) -> None:
        self.kernel, self.grid, self.block = kernel, _dim3(grid), _dim3(block)
        self.cluster, self.shared_bytes = _dim3(cluster or 1), shared_bytes
        self.programmatic = programmatic
        self.args = [args] if isinstance(args, ctypes.Structure) else [_argument(arg) for arg in args]
        self._addresses = (ctypes.c_void_p * len(self.args))(*map(ctypes.addressof, self.args))

    def point(self, argument: int, address: int) -> None:
        self._addresses[argument] = address

    def like(self, args: Sequence[Any]) -> Launch:
        shape = {
            "shared_bytes": self.shared_bytes,
            "cluster": self.cluster,
            "programmatic": self.programmatic,
        }
        return Launch(self.kernel, self.grid, self.block, args, **shape)

    def on(self, stream: int) -> None:
        self(stream)

    def __call__(self, stream: int | None = None) -> None:
        """Run every block to its end.

        Raises:
            EmulationError: an access out of bounds, a deadlock, a divergent barrier, ...
        """
        extents = buffers.extents()
        traced = traces.of(extents)
        addresses = (ctypes.c_void_p * len(traced))(*(trace.ctypes.data for trace in traced))
        sizes = (ctypes.c_size_t * len(self.args))(*map(ctypes.sizeof, self.args))
        edges = (ctypes.c_uint64 * (2 * len(extents)))(*(edge for extent in extents for edge in extent))
        launch = _Launch(
            *((ctypes.c_uint32 * 3)(*_dim3(dim)) for dim in (self.grid, self.block, self.cluster)),
            *(self.shared_bytes, len(self.args), len(extents), last_block_first, self.programmatic),
            *map(ctypes.addressof, (self._addresses, sizes, edges, addresses)),
        )
        self.kernel.run(launch)


class Kernel:
    """As strobe.cuda.launch.Kernel: a kernel of a source, ready to launch."""

    max_shared_bytes = 227 * 1024

    def __init__(self, built: Path, entry: str, device: int) -> None:
        self.name, self.device, self._built = entry, device, built
        library = _load(built)
        self._entry = ctypes.addressof(ctypes.c_char.in_dll(library, f"emulated_{entry}"))
        self._emulate = library.emulate
        self._emulate.restype = ctypes.c_char_p
        self._emulate.argtypes = [ctypes.c_void_p, ctypes.c_void_p]

    def __call__(
        self,
        grid: Dim,
        block: Dim,
        args: ctypes.Structure | Sequence[Any],
        *,
        stream: int | None = None,
        **options: Any,
    ) -> None:
        Launch(self, grid, block, args, **options)(stream)

    def prepare(
        self, grid: Dim, block: Dim, args: ctypes.Structure | Sequence[Any], **options: Any
    ) -> Launch:
        return Launch(self, grid, block, args, **options)

    def prefer_shared_memory(self) -> None:
        pass

    def run(self, launch: _Launch) -> None:
        failed = self._emulate(self._entry, ctypes.addressof(launch))
        if failed:
            message = re.sub(
                r"@([0-9a-f]+)", lambda at: build.source_line(self._built, int(at[1], 16)), failed.decode()
            )
            raise EmulationError(message)


@cache
def _load(built: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(built))


def kernel(
    source: Path, entry: str, defines: Mapping[str, Define] | None = None, device: int | None = None
) -> Kernel:
    """As `jit.kernel`."""
    device = torch.cuda.current_device() if device is None else device
    return _kernel(source, entry, tuple(sorted((defines or {}).items())), device)


@cache
def _kernel(source: Path, entry: str, defines: tuple[tuple[str, Define], ...], device: int) -> Kernel:
    return Kernel(build.library(source, dict(defines)), entry, device)
