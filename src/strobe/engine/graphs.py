"""Decode steps and short prompts as CUDA graphs: one launch in place of some hundred.

A graph reads and writes fixed addresses, for a fixed number of tokens. So a step is padded to one of a few
sizes, its arrays are sent to the places where the graph was captured to find them (`transfer.Staging`
never moves them), and its logits are read from where the graph leaves them. A size runs eagerly the first
time, which compiles and loads what it needs, and is captured while the device runs that: no request waits
for more than its own.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace
from typing import Protocol

import torch

from strobe.errors import DeviceError

_log = logging.getLogger(__name__)

LARGEST = 512
"""Rows, or tokens of a prompt, of the largest graph. From there on a step takes so long that its launches
hide behind it."""

Work = Callable[[], torch.Tensor]


class Recorder(Protocol):
    """Turns work into a recording: everything that CUDA has a part in."""

    def record(self, work: Work) -> tuple[torch.Tensor, Callable[[], None]]:
        """The tensor that the work returned, without having run it, and what runs it again.

        Raises:
            RuntimeError, DeviceError: the work does what cannot be recorded.
        """
        ...


class CudaRecorder:
    """Captures CUDA graphs, which share one pool of memory: they never run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def record(self, work: Work) -> tuple[torch.Tensor, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            # other threads may allocate meanwhile: kernels that are being loaded, another engine
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                result = work()
            except BaseException:
                with suppress(RuntimeError):  # a capture that a call has broken says so again
                    graph.capture_end()
                self._pool = (
                    torch.cuda.graph_pool_handle()
                )  # torch takes no pool again that lost its only graph
                raise
            graph.capture_end()
        current.wait_stream(self._stream)
        return _not_owning(result), graph.replay


def _not_owning(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor over the same memory, which is the pool's again: the next graph's tensors may lie there too,
    else each size would keep logits of its own."""
    memory = {"shape": (tensor.nbytes,), "typestr": "|u1", "data": (tensor.data_ptr(), False), "version": 3}
    holder = SimpleNamespace(__cuda_array_interface__=memory)
    return torch.as_tensor(holder, device=tensor.device).view(tensor.dtype).view(tensor.shape)


def recorder_for(device: torch.device) -> Recorder | None:
    """None where the device's work cannot be recorded."""
    return CudaRecorder(device) if device.type == "cuda" else None


_DECODE_SIZES = (1, 2, 4, *range(8, 64, 8), *range(64, 385, 16), 432, LARGEST)
"""A larger product of cuBLAS's can be the faster one: a layer of Llama-3-8B takes 320 µs for 400 tokens, 280
for 432, 412 for 448 and 315 for 512."""
PROMPT_SIZES = (*range(64, 385, 64), LARGEST)
"""Tokens of the graphs that run a prompt alone."""


def decode_sizes(rows: int) -> tuple[int, ...]:
    """Rows of the graphs of an engine that runs up to `rows` sequences."""
    largest = min(rows, LARGEST)
    return (*(size for size in _DECODE_SIZES if size < largest), largest)


class StepGraphs:
    """Graphs by size, one of `sizes`, ascending, and width of the page table."""

    def __init__(self, sizes: tuple[int, ...], recorder: Recorder) -> None:
        self.sizes = sizes
        self._recorder = recorder
        self._graphs: dict[tuple[int, int], tuple[torch.Tensor, Callable[[], None]]] = {}

    @property
    def captured(self) -> int:
        return len(self._graphs)

    def size_for(self, count: int) -> int | None:
        """The size of the smallest graph that holds so many; None where none does."""
        at = bisect_left(self.sizes, count)
        return self.sizes[at] if at < len(self.sizes) else None

    def run(self, size: int, width: int, work: Work) -> torch.Tensor:
        """What `work` returns for the arrays as they now lie on the device.

        `work` reads nothing but those arrays, at the same places for the same `size` and `width`, the
        weights and the cache. The tensor is overwritten by the next run of any graph.
        """
        graph = self._graphs.get((size, width))
        if graph is not None:
            result, replay = graph
            replay()
            return result
        result = work()
        try:
            self._graphs[size, width] = self._recorder.record(work)
        except (RuntimeError, DeviceError) as error:
            reason = str(error).strip().partition("\n")[0]
            _log.warning("steps run eagerly: these kernels cannot be captured in a CUDA graph: %s", reason)
            self.sizes = ()
        return result
