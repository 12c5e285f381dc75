"""How long calls take: after warm-up, many times, in turns with what they are compared with, the median.

A GPU's clock follows its temperature and its power limit: who runs first runs cool. So calls that are
compared take turns, in another order each round.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

FLUSH_BYTES = 256 << 20
"""Written between calls, so that none finds its inputs in the L2 cache (60 MB on an H200)."""
ROUNDS = 20


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


class Clock(Protocol):
    """Something that can be run and timed again and again."""

    def times(self, count: int) -> list[float]:
        """Milliseconds of each of `count` runs."""
        ...


@dataclass(frozen=True)
class HostClock:
    """A call on the CPU, by the host's clock."""

    call: Callable[[], object]

    def times(self, count: int) -> list[float]:
        found = []
        for _ in range(count):
            start = time.perf_counter()
            self.call()
            found.append((time.perf_counter() - start) * 1e3)
        return found


class EventClock:
    """A call on the GPU's current stream, by events, the L2 cache flushed before each run.

    While the GPU flushes, the host queues the call: flushes stand before each run until they outlast that, so
    that what a call takes is the GPU's time. A call that keeps the host longer than COVER_MS waits for it.
    """

    COVER_MS = 2.0

    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call
        self._flushes = 0

    def times(self, count: int) -> list[float]:
        flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
        self._flushes = self._flushes or self._enough(flush)
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for start, end in events:
            for _ in range(self._flushes):
                flush.zero_()
            start.record()
            self._call()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]

    def _enough(self, flush: torch.Tensor) -> int:
        """Flushes that take twice as long as the host takes to queue the second call."""
        self._call()
        torch.cuda.synchronize()
        began = time.perf_counter()
        self._call()
        host_ms = (time.perf_counter() - began) * 1e3
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        flush.zero_()
        end.record()
        end.synchronize()
        return max(1, math.ceil(2 * min(host_ms, self.COVER_MS) / start.elapsed_time(end)))


class GraphClock:
    """Calls as nodes of one CUDA graph: what the GPU takes, without the host.

    `calls` do the same work on different data, together larger than the L2 cache; the times are of
    one of them. They must be capturable, and are kept: a graph holds addresses, not the tensors there.
    Starting a graph and recording an event take some 10 µs: the graph holds the calls again and again until
    it has LAUNCHES nodes or takes LONG_MS, and as many replays stand between two events.
    """

    LAUNCHES = 24
    LONG_MS = 5.0

    def __init__(self, calls: Sequence[Callable[[], object]]) -> None:
        self._calls = calls
        self._stream = torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for call in calls:
                call()
            self._stream.synchronize()
        self._capture(1)
        self._replays = 1
        (once_ms,) = self.times(1)
        rounds = repeats(len(calls), once_ms, self.LAUNCHES, self.LONG_MS)
        if rounds > 1:
            self._capture(rounds)
        self._replays = repeats(self._nodes, once_ms, 4 * self.LAUNCHES, self.LONG_MS)

    def _capture(self, rounds: int) -> None:
        self._nodes = rounds * len(self._calls)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=self._stream):
            for _ in range(rounds):
                for call in self._calls:
                    call()

    def times(self, count: int) -> list[float]:
        """A mean over the calls between two events for each of them that `count` calls make, one at least."""
        between = self._nodes * self._replays
        with torch.cuda.stream(self._stream):
            events = [torch.cuda.Event(enable_timing=True) for _ in range(max(1, round(count / between)) + 1)]
            events[0].record()
            for event in events[1:]:
                for _ in range(self._replays):
                    self._graph.replay()
                event.record()
            self._stream.synchronize()
        return [a.elapsed_time(b) / between for a, b in itertools.pairwise(events)]


def repeats(calls: int, once_ms: float, launches: int, long_ms: float) -> int:
    """How often `calls` calls are run together: until there are `launches`, or they take `long_ms`."""
    enough = -(-launches // calls)
    long = math.ceil(long_ms / max(calls * once_ms, 1e-6))
    return max(1, min(enough, long))


def clock(call: Callable[[], object], device: str) -> Clock:
    """The clock for a call on "cuda" or "cpu"."""
    return EventClock(call) if device == "cuda" else HostClock(call)


def in_turns(clocks: Sequence[Clock], *, budget_ms: float = 200.0, most: int = 1000) -> list[Timing]:
    """Time several clocks in shuffled rounds, about `budget_ms` each and at least a run.

    Rounds are short, so that all meet the same clocks of the GPU: by 5 rounds of 40 ms what a kernel takes
    for each ms of another came out up to 14 % apart in two runs on an H200.
    """
    times: list[list[float]] = [[] for _ in clocks]
    plans = [_rounds_and_runs(each, budget_ms, most) for each in clocks]
    order = list(range(len(clocks)))
    for turn in range(ROUNDS):
        random.shuffle(order)
        for index in order:
            rounds, runs = plans[index]
            if (turn + 1) * rounds // ROUNDS > turn * rounds // ROUNDS:
                times[index] += clocks[index].times(runs)
    return [Timing.of(found) for found in times]


def _rounds_and_runs(each: Clock, budget_ms: float, most: int) -> tuple[int, int]:
    """In how many of the rounds it has its turn, and how often it runs then."""
    each.times(1)
    began = time.perf_counter()
    (once_ms,) = each.times(1)
    took_ms = (time.perf_counter() - began) * 1e3
    rounds = max(1, min(ROUNDS, int(budget_ms / max(took_ms, 1e-6))))
    return rounds, max(1, min(most, int(budget_ms / max(once_ms, 1e-6))) // rounds)


def measure(call: Callable[[], object], device: str, *, budget_ms: float = 200.0) -> Timing:
    """Time one call by itself."""
    (timing,) = in_turns([clock(call, device)], budget_ms=budget_ms)
    return timing
