"""What a call costs the host, by a clock and calls that are made up."""

from __future__ import annotations

import time
from collections import Counter

import pytest
import torch

from strobe.bench import host


def test_calls_take_turns_and_each_has_its_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    waits: list[int] = []
    batches: list[str] = []

    def call(name: str, seconds: float) -> None:
        nonlocal now
        now += seconds
        if len(waits) > len(batches):
            batches.append(name)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(1))
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    taken = host.in_turns({"quick": lambda: call("quick", 2e-6), "slow": lambda: call("slow", 3e-5)})
    assert taken["quick"].ms == pytest.approx(2e-3)
    assert taken["slow"].ms_min == pytest.approx(3e-2)
    rounds = [frozenset(batches[i : i + 2]) for i in range(0, len(batches), 2)]
    assert Counter(rounds) == {frozenset({"quick", "slow"}): host._ROUNDS}
    assert len({tuple(batches[i : i + 2]) for i in range(0, len(batches), 2)}) == 2, "always in one order"
