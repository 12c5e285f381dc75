"""What an eager call costs the host: how long it takes to return, the GPU's work left behind."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from strobe.attention.api import attention
from strobe.attention.cases import Case
from strobe.bench.attention import described, torch_dtype
from strobe.bench.peers import Peer
from strobe.bench.results import Row
from strobe.bench.timer import Timing

_BATCH, _BATCHES = 32, 60
"""Calls timed together, so few that the driver's queue of launches never fills; and how often."""


def measure(call: Callable[[], object]) -> Timing:
    """Host time of one call: the median, least and most of batch means. Waits for the GPU between batches."""
    times = []
    for _ in range(_BATCHES):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(_BATCH):
            call()
        times.append((time.perf_counter() - start) / _BATCH * 1e3)
    torch.cuda.synchronize()
    return Timing.of(times[_BATCHES // 10 :])


def measure_all(cases: Sequence[Case], peers: Sequence[Peer], dtype: str) -> Iterator[Row]:
    """A row a case for `strobe.attention` and each peer that runs it: `host_us` the median, `host_us_min`."""
    for case in cases:
        inputs = case.inputs(torch_dtype(dtype), "cuda")
        eager = partial(attention, inputs.q, inputs.k, inputs.v, **inputs.options)
        calls: dict[str, Callable[[], object]] = {"strobe": eager}
        for peer in peers:
            if not peer.refusals(inputs.problem) and not peer.missing():
                calls[peer.name] = peer.make(peer.load(), inputs)
        for provider, call in calls.items():
            taken = measure(call)
            figures = {"host_us": taken.ms * 1e3, "host_us_min": taken.ms_min * 1e3}
            yield {"case": described(case, dtype), "provider": provider, **figures}
