"""What an eager call costs the host: how long it takes to return, the GPU's work left behind."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch

from strobe.attention.api import attention
from strobe.attention.cases import Case
from strobe.bench.attention import described, torch_dtype
from strobe.bench.peers import Peer
from strobe.bench.results import Row
from strobe.bench.timer import Timing

_BATCH, _ROUNDS = 32, 60
"""Calls timed together, so few that the driver's queue of launches never fills; and how often."""


def in_turns(calls: Mapping[str, Callable[[], object]]) -> dict[str, Timing]:
    """Host time of one call of each: the median, least and most of batch means.

    They take turns, in another order each round, so that what else the machine does meets all of them. Each
    batch begins when the GPU has nothing to do; what a call returns is let go before the next.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for _ in range(_ROUNDS):
        random.shuffle(order)
        for name in order:
            call = calls[name]
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(_BATCH):
                call()
            times[name].append((time.perf_counter() - start) / _BATCH * 1e3)
    torch.cuda.synchronize()
    return {name: Timing.of(found[_ROUNDS // 10 :]) for name, found in times.items()}


def measure_all(cases: Sequence[Case], peers: Sequence[Peer], dtype: str) -> Iterator[Row]:
    """A row a case for `strobe.attention` and each peer that runs it: `host_us` the median, `host_us_min`."""
    for case in cases:
        inputs = case.inputs(torch_dtype(dtype), "cuda")
        eager = partial(attention, inputs.q, inputs.k, inputs.v, **inputs.options)
        calls: dict[str, Callable[[], object]] = {"strobe": eager}
        for peer in peers:
            if not peer.refusals(inputs.problem) and not peer.missing():
                calls[peer.name] = peer.make(peer.load(), inputs)
        for provider, taken in in_turns(calls).items():
            figures = {"host_us": taken.ms * 1e3, "host_us_min": taken.ms_min * 1e3}
            yield {"case": described(case, dtype), "provider": provider, **figures}
