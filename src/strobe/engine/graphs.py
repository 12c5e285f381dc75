"""Decode steps as CUDA graphs: one launch in place of some hundred.

A graph reads and writes fixed addresses, for a fixed number of rows. So a step is padded to one of a few
sizes, its arrays are sent to the places where the graph was captured to find them (`transfer.Staging`
never moves them), and its logits are read from where the graph leaves them. A size runs eagerly the first
time, which compiles and loads what it needs, and is captured the second time: a request waits for one
capture a step at most.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import Protocol

import torch

LARGEST = 512
"""Rows of the largest graph. From there on a step takes so long that its launches hide behind it."""

Work = Callable[[], torch.Tensor]


class Recorder(Protocol):
    """Turns work into a recording: everything that CUDA has a part in."""

    def record(self, work: Work) -> tuple[torch.Tensor, Callable[[], None]]:
        """The tensor that the work returned, without having run it, and what runs it again."""
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
            finally:
                graph.capture_end()
        current.wait_stream(self._stream)
        return result, graph.replay


def recorder_for(device: torch.device) -> Recorder | None:
    """None where the device's work cannot be recorded."""
    return CudaRecorder(device) if device.type == "cuda" else None


def sizes_upto(rows: int) -> tuple[int, ...]:
    """Rows of the graphs of an engine that runs up to `rows` sequences: 1, 2, 4, then multiples of 8."""
    largest = min(rows, LARGEST)
    return (*(size for size in (1, 2, 4, *range(8, largest, 8)) if size < largest), largest)


class DecodeGraphs:
    """Graphs by number of rows and width of the page table."""

    def __init__(self, max_rows: int, recorder: Recorder) -> None:
        self.sizes = sizes_upto(max_rows)
        self._recorder = recorder
        self._graphs: dict[tuple[int, int], tuple[torch.Tensor, Callable[[], None]] | None] = {}

    @property
    def captured(self) -> int:
        return sum(graph is not None for graph in self._graphs.values())

    def size_for(self, rows: int) -> int | None:
        """The rows of the smallest graph that holds so many; None where none does."""
        return self.sizes[bisect_left(self.sizes, rows)] if rows <= self.sizes[-1] else None

    def run(self, size: int, width: int, work: Work) -> torch.Tensor:
        """What `work` returns for the arrays as they now lie on the device.

        `work` reads nothing but those arrays, at the same places for the same `size` and `width`, the
        weights and the cache. The tensor is overwritten by the next run of any graph.
        """
        key = size, width
        if key not in self._graphs:
            self._graphs[key] = None
            return work()
        graph = self._graphs[key] or self._recorder.record(work)
        self._graphs[key] = graph
        result, replay = graph
        replay()
        return result
