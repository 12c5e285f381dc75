"""The soak's books: a sound engine passes with preemptions and aborts, and each fault is found."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from strobe.bench import soak
from strobe.bench.soak import Soak
from strobe.bench.subject import Subject
from strobe.engine import Engine, EngineConfig
from strobe.errors import StrobeError
from strobe.models import shapes

SMALL = replace(
    shapes.SHAPES["llama3.2-1b"], layers=1, hidden=32, intermediate=48, q_heads=2, kv_heads=1, head_dim=16,
    vocab_size=60, max_position=64,
)  # fmt: skip
LOAD = Soak(tokens=500, in_flight=12, prompt=24, output=24)


@pytest.fixture
def small() -> Subject:
    model = shapes.random_model(SMALL, device="cpu", dtype=torch.float32, seed=torch.seed() % 2**31)
    config = EngineConfig(
        page_size=4,
        kv_cache_pages=40,
        max_model_len=48,
        attention_kernel="torch_naive",
        linear_kernel="torch_linear",
    )
    return Subject("small", Engine(model, None, config))


def test_a_sound_engine_keeps_its_books(small: Subject) -> None:
    seen: list[int] = []
    row = soak.run(small, replace(LOAD, seed=torch.seed() % 2**31), seen.append)
    assert row["checked"], row
    assert row["requests"] == row["finished"] + row["dropped"]
    assert row["output_tokens"] >= 500
    assert row["preemptions"] > 0
    assert row["used_pages"] == row["lost"] == row["short"] == row["wrong"] == 0
    assert row["host_growth_bytes"] < 64 << 20
    assert seen == sorted(seen)
    assert seen[-1] <= LOAD.tokens


def test_a_page_that_is_not_given_back_is_found(small: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = small.engine.scheduler.cache
    honest, calls = cache.release, []

    def forgets_one(pages) -> None:
        calls.append(pages)
        if len(calls) != 9:
            honest(pages)

    monkeypatch.setattr(cache, "release", forgets_one)
    with pytest.raises(StrobeError, match="page"):
        soak.run(small, LOAD)


def test_tokens_that_are_not_there_are_found(small: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "first_wrong", lambda model, prompt, tokens: 0)
    row = soak.run(small, LOAD)
    assert row["wrong"] > 0
    assert not row["checked"]
    monkeypatch.undo()
    honest = soak._end

    def asks_for_more(tally, request) -> None:
        request.params = replace(request.params, max_tokens=request.params.max_tokens + 1)
        honest(tally, request)

    monkeypatch.setattr(soak, "_end", asks_for_more)
    row = soak.run(small, LOAD)
    assert row["short"] > 0
    assert not row["checked"]


@pytest.mark.parametrize("where", ["host", "device"])
def test_memory_that_grows_is_found(small: Subject, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    held = iter(range(0, 1 << 40, 100 << 20))
    monkeypatch.setattr(soak, f"{where}_bytes", lambda: next(held))
    row = soak.run(small, LOAD)
    assert row[f"{where}_growth_bytes"] == 100 << 20
    assert not row["checked"]


@pytest.mark.parametrize("wrong", [{"tokens": 0}, {"in_flight": 0}, {"abort_one_in": 1}], ids=str)
def test_a_soak_that_cannot_be_is_refused(wrong: dict) -> None:
    with pytest.raises(StrobeError, match="supported"):
        Soak(**wrong)
