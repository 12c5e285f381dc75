from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from strobe.bench import ceilings, engine_suite
from strobe.bench.engine_cases import Batch, Load
from strobe.bench.results import Result
from strobe.models import shapes

from .conftest import Cli

CPU = ("bench", "engine", "--device", "cpu", "--runs", "1", "--engine", "kv_cache_pages=64")
CPU += ("--kernel", "torch_naive", "--linear", "torch_linear")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"layers": 1, "hidden": 32, "intermediate": 48, "q_heads": 2, "kv_heads": 1, "vocab_size": 99}
    for name in engine_suite.STANDARD:
        monkeypatch.setitem(shapes.SHAPES, name, replace(shapes.SHAPES[name], **sizes, max_position=256))
        monkeypatch.setitem(engine_suite.STANDARD, name, (Batch(2, 5, 4), Load(2, (3, 9), (2, 5))))
    monkeypatch.setattr(ceilings, "ceilings", lambda device, dtype: ceilings.Ceilings(dtype, 0.5, 50.0))


def test_models_add_up_to_one_file(cli: Cli, tmp_path: Path) -> None:
    saved = ("--save", str(tmp_path / "engine.json"), "--add")
    first = cli(*CPU, *saved, "--random", "llama3-8b")
    assert "llama3-8b (random weights)" in first.out
    assert "% of the floor" in first.err
    result = json.loads(cli(*CPU, *saved, "--random", "llama3.2-1b", "--vs", "transformers", "--json").out)
    assert Result.load(tmp_path / "engine.json").rows == result["rows"]
    assert [(row["case"]["model"], row["provider"]) for row in result["rows"]] == [
        ("llama3.2-1b", "strobe"), ("llama3.2-1b", "transformers"), ("llama3.2-1b", "strobe"),
        ("llama3-8b", "strobe"), ("llama3-8b", "strobe"),
    ]  # fmt: skip
    assert all(row["checked"] and row["floor_percent"] > 0 for row in result["rows"])


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("--suite", "standart"), "did you mean 'standard'?"),
        (("--random", "llama3-9b"), "did you mean 'llama3-8b'?"),
        (("--vs", "vlm"), "did you mean 'vllm'?"),
        (("--dtype", "int8"), "unknown dtype 'int8'"),
        (("--engine", "max_num_seq=4"), "did you mean 'max_num_seqs'?"),
        (("--engine", "max_num_seqs=many"), "max_num_seqs is 'many'"),
        (("--engine", "max_num_seqs"), "--engine max_num_seqs=VALUE"),
        (("--runs", "0"), "runs is 0"),
    ],
    ids=" ".join,
)
def test_mistake_is_one_line(cli: Cli, args: tuple[str, ...], told: str) -> None:
    assert told in cli(*CPU, *args).error
