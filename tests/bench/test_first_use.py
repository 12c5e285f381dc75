"""First calls: each in a process of its own, cold with an empty cache, then with what that left there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from strobe.attention import ladder
from strobe.bench import first_use
from strobe.bench.first_use import Subject
from strobe.errors import KernelRefusedError

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def told(monkeypatch: pytest.MonkeyPatch, **made: Callable[[], Subject]) -> dict[str, dict[str, Any]]:
    monkeypatch.setattr(first_use, "subjects", lambda device: made)
    return {row.pop("rung"): row for row in first_use.measure("cpu")}


def test_the_second_process_finds_what_the_first_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make() -> Subject:
        def call() -> torch.Tensor:
            kept = Path(os.environ["STROBE_CACHE_DIR"]) / "kept"
            state = "warm" if kept.exists() else "cold"
            kept.parent.mkdir(exist_ok=True)
            kept.touch()
            with (tmp_path / "calls").open("a") as file:
                file.write(f"{state} {os.getpid()} {kept}\n")
            return torch.zeros(1)

        return Subject(call, lambda out: bool((out == 0).all()))

    rows = told(monkeypatch, a=make, b=make)
    for row in rows.values():
        assert row["checked"] is True
        assert row["first_s"] > 0
        assert row["later_ms"] > 0
    calls = [line.split() for line in (tmp_path / "calls").read_text().splitlines()]
    assert [state for state, *_ in calls] == ["cold", "cold", "warm", "warm"]
    assert len({process for _, process, _ in calls} | {str(os.getpid())}) == 5
    assert len({folder for *_, folder in calls}) == 2
    assert "STROBE_CACHE_DIR" not in os.environ or os.environ["STROBE_CACHE_DIR"] not in calls[0][2]


def test_who_does_not_run_is_told_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> Subject:
        raise KernelRefusedError("head_dim 7")

    def die() -> Subject:
        os._exit(3)

    def wrong() -> Subject:
        return Subject(lambda: torch.zeros(1), lambda out: False)

    rows = told(monkeypatch, refuse=refuse, die=die, wrong=wrong)
    assert rows["refuse"] == {"refused": "head_dim 7"}
    assert rows["die"] == {"refused": "its process died"}
    assert rows["wrong"]["checked"] is False


def test_each_rung_with_kernels_of_its_own_is_asked() -> None:
    expected = {
        str(rung)
        for rung in (*ladder.PREFILL, *ladder.DECODE)
        if any(kind in rung.name for kind in ("cuda_", "triton_"))
    }
    found = first_use.subjects("cuda")
    assert expected <= set(found)
    assert {"linear/cuda_gemv", "linear/cuda_matmul_naive", "ops/softmax"} <= set(found)
    assert not any("numba" in name for name in found)
    others = {"prefill/torch_naive"}
    assert {name for name in first_use.subjects("cpu") if "numba" not in name} == others
