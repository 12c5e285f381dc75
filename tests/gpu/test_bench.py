"""What the benches stand on, on a GPU: a ceiling that read everything, replays that run all calls alike."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial

import pytest
import torch

from strobe.bench import read
from strobe.bench.timer import GraphClock
from strobe.device import gpu

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("pieces", [1, 131, 133, 5000])
def test_the_ceilings_kernel_reads_every_piece(pieces: int) -> None:
    seen = gpu()
    if not read.runs(seen.arch, seen.shared_memory_per_block):
        pytest.skip(f"bulk copies came with compute capability 9.0; this GPU has {seen.arch / 10}")
    data = torch.randint(-(2**31), 2**31 - 1, (pieces * read.PIECE // 4,), dtype=torch.int32, device="cuda")
    total = torch.zeros(1, dtype=torch.int32, device="cuda")
    read.read_once(data, total)
    assert int(total) == read.first_words(data)


@pytest.mark.parametrize("sets", [1, 3, 40])
def test_a_replay_runs_each_call_as_often_as_the_others(sets: int) -> None:
    counts = torch.zeros(sets, device="cuda")
    calls: list[Callable[[], object]] = [partial(counts[i].add_, 1) for i in range(sets)]
    clock = GraphClock(calls)
    before = counts.clone()
    times = clock.times(100)
    ran = (counts - before).unique()
    assert len(ran) == 1
    assert ran >= 50 / sets
    assert all(ms > 0 for ms in times)


def test_a_clock_keeps_what_its_graph_writes() -> None:
    """The next capture gives cached memory back to the driver: a replay into it would be illegal."""
    written = torch.zeros(64 << 20, dtype=torch.int8, device="cuda")
    seen = weakref.ref(written)
    clock = GraphClock([partial(written.fill_, 7)])
    del written
    GraphClock([partial(torch.ones, 4, device="cuda")])
    clock.times(10)
    assert seen() is not None
    assert bool((seen() == 7).all())
