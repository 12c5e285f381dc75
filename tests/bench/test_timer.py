"""Clocks take turns in many short rounds, and none gets much more than its budget."""

from __future__ import annotations

import itertools
import random

import pytest

from strobe.bench import timer


class Fake:
    """A call of so many ms, by a host's clock of its own."""

    now = 0.0

    def __init__(self, name: str, ms: float, log: list[tuple[str, int]]) -> None:
        self.name, self.ms, self.log = name, ms, log

    def times(self, count: int) -> list[float]:
        Fake.now += count * self.ms * 1e-3
        self.log.append((self.name, count))
        return [self.ms] * count


def test_rounds_are_short_and_the_budget_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timer.time, "perf_counter", lambda: Fake.now)
    log: list[tuple[str, int]] = []
    budget = random.uniform(50, 500)
    ms = {"quick": budget / 731, "middling": budget / 33, "slow": budget / 4.5, "endless": 3 * budget}
    timings = timer.in_turns([Fake(name, each, log) for name, each in ms.items()], budget_ms=budget, most=600)
    log = log[8:]  # two runs each, by which the rounds are planned
    runs = {name: [count for each, count in log if each == name] for name in ms}
    for (name, each), timing in zip(ms.items(), timings, strict=True):
        assert timing.ms == each
        assert timing.runs == sum(runs[name])
        assert sum(runs[name]) == 1 or sum(runs[name]) * each <= budget
        assert len(set(runs[name])) == 1
    assert {name: len(each) for name, each in runs.items()} == {
        "quick": timer.ROUNDS, "middling": timer.ROUNDS, "slow": 4, "endless": 1,
    }  # fmt: skip
    assert sum(runs["quick"]) > 500
    at = [i for i, (name, _) in enumerate(log) if name == "slow"]
    assert min(b - a for a, b in itertools.pairwise(at)) > 2 * timer.ROUNDS // 5  # all along, not at first
