from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from strobe.bench import engine_ladder
from strobe.bench.results import Result, Row
from strobe.models import shapes

from .conftest import Cli

SHORT = ("bench", "engine-ladder", "--device", "cpu", "--prompt", "7", "--output", "3", "--runs", "1")


def test_a_model_as_table_and_json(cli: Cli, model_folder: Path, tmp_path: Path) -> None:
    saved = tmp_path / "engine_ladder.json"
    told = cli(*SHORT, "--model", str(model_folder), "--vs", "transformers", "--save", str(saved)).out
    assert told.startswith("random-llama, prompt 7, output 3, float32 on cpu\n")
    for name in (
        "naive_attention",
        "online_softmax",
        "fused_attention",
        "onednn",
        "fastest",
        "transformers",
        "% of",
    ):
        assert name in told
    assert "on an NVIDIA GPU: naive_matmul (torch_naive + cuda_matmul_naive)" in told
    result = Result.load(saved)
    assert [row["checked"] for row in result.rows] == [True] * 6
    assert result.rows[-1]["provider"] == "transformers"
    assert {"ttft_ms", "tok_s", "gbps"} <= result.rows[-1].keys()
    assert json.loads(cli(*SHORT, "--model", str(model_folder), "--json").out)["bench"] == "engine_ladder"


def test_an_interrupt_keeps_the_engines_that_are_done(
    cli: Cli, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = engine_ladder.measure

    def interrupted(*args: Any, **options: Any) -> Iterator[Row]:
        yield next(whole(*args, **options))
        raise KeyboardInterrupt

    monkeypatch.setattr(engine_ladder, "measure", interrupted)
    saved = tmp_path / "engine_ladder.json"
    outcome = cli(*SHORT, "--model", str(model_folder), "--vs", "transformers", "--save", str(saved))
    assert "stopped: 1 of 5 engines are measured" in outcome.err
    assert len(Result.load(saved).rows) == 1


def test_random_weights_are_said_to_be(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"layers": 1, "hidden": 32, "intermediate": 48, "q_heads": 2, "kv_heads": 1, "vocab_size": 99}
    monkeypatch.setitem(shapes.SHAPES, "llama3-8b", replace(shapes.SHAPES["llama3-8b"], **small))
    outcome = cli(*SHORT, "--random", "llama3-8b", "--dtype", "bfloat16", "--json")
    for row in json.loads(outcome.out)["rows"]:
        assert (row["case"]["model"], row["case"]["dtype"]) == ("llama3-8b", "bfloat16")
        assert row["case"]["weights"] == "random"


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("--random", "llama3-7b"), "did you mean 'llama3-8b'?"),
        (("--random", "llama3-8b", "--model", "x"), "--model and --random are both given"),
        (("--random", "llama3-8b", "--dtype", "bf16"), "unknown dtype 'bf16'"),
        (("--runs", "0"), "runs is 0"),
        (("--output", "1"), "output 1"),
        (("--vs", "vlm"), "did you mean 'vllm'?"),
        (("--vs", "vllm"), "vLLM is measured on random weights"),
        (("--prompt", "100000"), "max_model_len"),
        (("--device", "cuda:9"), "cuda:9"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_mistake_is_one_line(cli: Cli, args: tuple[str, ...], told: str) -> None:
    assert told in cli(*SHORT, *args).error
