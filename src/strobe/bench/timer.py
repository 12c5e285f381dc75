"""How long a call takes: after warm-up, many times, the median."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

FLUSH_BYTES = 256 << 20
"""Written between calls, so that none finds its inputs in the L2 cache (60 MB on an H200)."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds over `runs` calls."""

    ms: float
    ms_min: float
    ms_max: float
    runs: int

    @classmethod
    def of(cls, times_ms: Sequence[float]) -> Timing:
        return cls(statistics.median(times_ms), min(times_ms), max(times_ms), len(times_ms))


def measure(call: Callable[[], object], device: str, *, budget_ms: float = 200.0, most: int = 200) -> Timing:
    """Time one call again and again, about `budget_ms` in all, at least five times; a call that outlasts
    the budget by itself is timed once.

    On a GPU by events on the current stream with the L2 cache flushed before each call; on a CPU by
    the clock.
    """
    return _measure_cuda(call, budget_ms, most) if device == "cuda" else _measure_cpu(call, budget_ms, most)


def _measure_cpu(call: Callable[[], object], budget_ms: float, most: int) -> Timing:
    def once() -> float:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3

    once()
    first = once()
    return Timing.of(
        [first] if first > budget_ms else [once() for _ in range(_repeats(first, budget_ms, most))]
    )


def _measure_cuda(call: Callable[[], object], budget_ms: float, most: int) -> Timing:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def batch(count: int) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for start, end in events:
            flush.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]

    batch(1)
    if (first := batch(1)[0]) > budget_ms:
        return Timing.of([first])
    return Timing.of(batch(_repeats(statistics.median(batch(3)), budget_ms, most)))


def measure_graph(calls: Sequence[Callable[[], object]], *, budget_ms: float = 200.0) -> Timing:
    """Time calls as nodes of one CUDA graph: what the GPU takes, without the host.

    `calls` do the same work on different data, together larger than the L2 cache; the timing is of
    one of them. They must be capturable.
    """
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()

        def batch(count: int) -> list[float]:
            events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
            events[0].record()
            for event in events[1:]:
                graph.replay()
                event.record()
            stream.synchronize()
            return [a.elapsed_time(b) / len(calls) for a, b in itertools.pairwise(events)]

        batch(2)
        once = statistics.median(batch(3)) * len(calls)
        return Timing.of(batch(_repeats(once, budget_ms, 1000)))


def _repeats(once_ms: float, budget_ms: float, most: int) -> int:
    return max(5, min(most, int(budget_ms / max(once_ms, 1e-6))))
