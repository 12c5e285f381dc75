"""`strobe bench profile`, `startup` and `soak` on a CPU, on the smallest models."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from strobe.bench import soak, startup
from strobe.bench.results import Result
from strobe.models import shapes

from .conftest import Cli

CPU = ("--device", "cpu")
TORCH = ("--kernel", "torch_naive", "--linear", "torch_linear")  # which need no compiling


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"layers": 1, "hidden": 32, "intermediate": 48, "q_heads": 2, "kv_heads": 1, "vocab_size": 99}
    shape = replace(shapes.SHAPES["llama3-8b"], **sizes, max_position=128)
    monkeypatch.setitem(shapes.SHAPES, "llama3-8b", shape)


def test_profile(cli: Cli, small: None, tmp_path: Path) -> None:
    saved, trace = tmp_path / "profile.json", tmp_path / "trace.json"
    flags = ("bench", "profile", *CPU, "--random", "llama3-8b", "--batch", "3", "--context", "20")
    flags += TORCH
    told = cli(*flags, "--steps", "2", "--save", str(saved), "--trace", str(trace)).out
    assert "llama3-8b, batch 3, context 20, float32: " in told
    assert "products with the weights" in told
    (row,) = Result.load(saved).rows
    assert row["steps"] == 2
    assert row["case"]["weights"] == "random"
    assert json.loads(trace.read_text())["traceEvents"]


def test_startup_of_new_processes(cli: Cli, model_folder: Path) -> None:
    told = cli("bench", "startup", *CPU, "--model", str(model_folder), *TORCH, "--runs", "1", "--json").out
    rows = json.loads(told)["rows"]
    assert [row["case"]["cache"] for row in rows] == ["cold", "warm"]
    for row in rows:
        assert row["case"]["model"] == "random-llama"
        assert row["total_s"] == pytest.approx(sum(row[phase] for phase in startup.PHASES))
        assert all(row[phase] >= 0 for phase in startup.PHASES)


def test_startup_of_kernels(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    seconds = iter([{"a/x": [1.5, 0.5], "b/y": [0.25]}, {"a/x": [0.002, 0.004], "b/y": [0.001]}])

    def child(cache: Path, what: str, given: dict) -> dict:
        asked.append((cache, what, given))
        return {"sources": next(seconds), "on_gpu": False}

    monkeypatch.setattr(startup, "_child", child)
    rows = json.loads(cli("bench", "startup", "--kernels", "--arch", "sm_90a", "--json").out)["rows"]
    assert [(row["case"]["source"], row["compile_s"], row["load_ms"]) for row in rows] == [
        ("a/x", 1.5, 4.0), ("b/y", 0.25, 1.0),
    ]  # fmt: skip
    assert asked[0] == asked[1]  # twice the same, on one cache: what the second finds, the first has left
    assert asked[0][1:] == ("kernels", {"arch": "sm_90a"})


def test_startup_of_rungs(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    told = [
        {"rung": "decode/x", "checked": True, "first_s": 2.5, "later_ms": 31.0},
        {"rung": "linear/y", "checked": False, "first_s": 0.5, "later_ms": 7.0},
        {"rung": "linear/z", "refused": "its process died"},
    ]
    monkeypatch.setattr(startup, "_output", lambda *_: "".join(json.dumps(each) + "\n" for each in told))
    lines = cli("bench", "startup", "--rungs", "--device", "cpu").out.splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["decode/x", "2.5", "31"],
        ["linear/y", "0.5", "7", "WRONG"],
        ["linear/z", "–", "–", "its", "process", "died"],
    ]
    rows = json.loads(cli("bench", "startup", "--rungs", "--device", "cpu", "--json").out)["rows"]
    assert rows[0]["case"] == {"rung": "decode/x", "arch": "cpu"}


def test_each_source_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    from strobe.cuda import jit, sources

    chosen = [source for source in sources.every("sm_90a") if sources.name_of(source).startswith("ops/")][:3]
    monkeypatch.setattr(sources, "every", lambda arch: chosen)
    monkeypatch.setattr(jit, "compile", lambda *_: None)
    told = startup._kernels({"arch": "sm_90a"})
    assert sum(map(len, told["sources"].values())) == 3
    assert told["on_gpu"] is False


def test_soak(cli: Cli, small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("bench", "soak", *CPU, "--random", "llama3-8b", "--tokens", "60", "--in-flight", "4")
    flags += ("--prompt", "8", "--output", "8", *TORCH)
    outcome = cli(*flags, "--save", str(tmp_path / "soak.json"))
    assert outcome.code == 0, outcome
    assert re.search(r"pages still held +0 of", outcome.out)
    assert Result.load(tmp_path / "soak.json").rows[0]["checked"] is True
    monkeypatch.setattr(soak, "first_wrong", lambda *_: 0)
    assert cli(*flags).code == 1


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("profile", "--steps", "0"), "steps is 0"),
        (("profile", "--batch", "0"), "batch 0"),
        (("profile", "--trace", os.path.join("no", "such", "x.json")), "no such folder"),
        (("profile", "--trace", os.curdir), "is a folder"),
        (("startup", "--runs", "0"), "runs is 0"),
        (("startup", "--random", "llama3-9b"), "did you mean 'llama3-8b'?"),
        (("startup", "--random", "llama3-8b", "--model", "x"), "--model and --random are both given"),
        (("startup", "--model", "no/such/folder"), "the process that was to start failed"),
        (("startup", "--kernels", "--arch", "sm_10"), "unknown arch 'sm_10'"),
        (("startup", "--kernels", "--rungs"), "--kernels and --rungs are both given"),
        (("startup", "--rungs", "--random", "llama3-8b"), "--rungs and --random are both given"),
        (("startup", "--rungs", "--arch", "sm_90a"), "--arch is for --kernels"),
        (("soak", "--tokens", "0"), "tokens 0"),
        (("soak", "--engine", "kv_cache_page=3"), "did you mean 'kv_cache_pages'?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_mistake_is_one_line(cli: Cli, args: tuple[str, ...], told: str) -> None:
    device = () if "--kernels" in args else CPU
    assert told in cli("bench", *args, *device).error
