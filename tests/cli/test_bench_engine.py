from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from strobe.bench import engine, vllm
from strobe.bench.engine_cases import Job
from strobe.bench.results import Result
from strobe.models import shapes

from .conftest import Cli, Outcome


@pytest.fixture
def bench(cli: Cli, model_folder: Path) -> Cli:
    def call(verb: str, *args: str) -> Outcome:
        kernels = ("--kernel", "torch_naive", "--linear", "torch_linear")  # which need no compiling
        model = ("--model", str(model_folder), "--device", "cpu", *kernels)
        return cli("bench", verb, *model, "--runs", "1", *args)

    return call


LATENCY = ("latency", "--prompt", "9", "--output", "5")
THROUGHPUT = ("throughput", "--requests", "5", "--prompt", "3", "20", "--output", "2", "9")


def test_latency_beside_transformers(bench: Cli, tmp_path: Path) -> None:
    saved, figure = tmp_path / "latency.json", tmp_path / "latency.svg"
    outcome = bench(*LATENCY, "--vs", "transformers", "--json", "--save", str(saved), "--plot", str(figure))
    result = json.loads(outcome.out)
    assert [row["provider"] for row in result["rows"]] == ["strobe", "transformers"]
    for row in result["rows"]:
        assert row["checked"] is True
        assert row["case"] == result["rows"][0]["case"]
        assert (row["case"]["prompt"], row["case"]["output"]) == (9, 5)
        assert 0 < row["tpot_ms_min"] <= row["tpot_ms"] <= row["tpot_ms_max"]
        assert row["ttft_ms"] > 0
    assert Result.load(saved).rows == result["rows"]
    assert b"<svg" in figure.read_bytes()


def test_throughput_beside_transformers(bench: Cli, tmp_path: Path) -> None:
    figure = tmp_path / "throughput.png"
    rows = json.loads(bench(*THROUGHPUT, "--vs", "transformers", "--json", "--plot", str(figure)).out)["rows"]
    assert [row["checked"] for row in rows] == [True, True]
    assert rows[0]["output_tokens"] == rows[1]["output_tokens"]
    assert rows[0]["tok_s"] == pytest.approx(rows[0]["output_tokens"] / rows[0]["s"])
    assert figure.stat().st_size > 0


def test_tables(bench: Cli) -> None:
    for args in (LATENCY, THROUGHPUT):
        alone = bench(*args).out
        assert "strobe" in alone
        assert "tokens hold: yes" in alone
        assert "times transformers's tok/s" in bench(*args, "--vs", "transformers").out


def test_a_wrong_answer_is_told(bench: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = engine.Strobe.one

    def wrong(self: engine.Strobe, prompt: list[int], output: int) -> engine.Generation:
        found = honest(self, prompt, output)
        return engine.Generation(tuple(abs(token - 1) for token in found.token_ids), found.at_s)

    monkeypatch.setattr(engine.Strobe, "one", wrong)
    outcome = bench(*LATENCY, "--vs", "transformers")
    assert "tokens hold: NO" in outcome.out


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("latency", "--vs", "transformer"), "did you mean 'transformers'?"),
        (("latency", "--plot", "figure.bmp"), ".png, .svg, .pdf"),
        (("latency", "--runs", "0"), "runs is 0"),
        (("latency", "--prompt", "0"), "prompt"),
        (("latency", "--output", "100000"), "100000"),
        (("throughput", "--requests", "0"), "requests is 0"),
        (("throughput", "--prompt", "9", "3"), "prompt lengths 9 to 3"),
        (("throughput", "--prompt", "9"), "--prompt"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_mistake_is_one_line(bench: Cli, args: tuple[str, ...], told: str) -> None:
    assert told in bench(*args).error


@pytest.mark.parametrize(
    ("verb", "flags"),
    [
        ("latency", ("--prompt", "9", "--output", "5")),
        ("throughput", ("--requests", "3", "--prompt", "3", "9", "--output", "2", "5")),
        ("engine-ladder", ("--prompt", "9", "--output", "5")),
    ],
)
def test_vllm_stands_beside_every_engine(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, verb: str, flags: tuple[str, ...]
) -> None:
    small = {"layers": 1, "hidden": 32, "intermediate": 48, "q_heads": 2, "kv_heads": 1, "vocab_size": 99}
    monkeypatch.setitem(shapes.SHAPES, "llama3-8b", replace(shapes.SHAPES["llama3-8b"], **small))
    monkeypatch.setattr(vllm, "check_installed", lambda: None)

    def measured(config: object, dtype: str, jobs: list[Job], *, peer: str, **_: object):
        if peer == "vllm-in-process":
            return ["no memory"] * len(jobs), {}
        return [[1.0 + sum(job.outputs)] * job.runs for job in jobs], {"version": "0"}

    monkeypatch.setattr(vllm, "measure", measured)
    call = ("bench", verb, *flags, "--random", "llama3-8b", "--device", "cpu", "--runs", "1", "--vs")
    rows = json.loads(cli(*call, "vllm,vllm-in-process", "--json").out)["rows"]
    done, failed = rows[-2:]
    assert (done["provider"], failed["provider"]) == ("vllm", "vllm-in-process")
    wanted = 1.0 if verb != "throughput" else done["output_tokens"] / (1.0 + done["output_tokens"])
    assert done["tok_s"] == pytest.approx(wanted)
    assert done["gbps"] > 0
    assert failed["failed"] == "no memory"
    assert "no memory" in cli(*call, "vllm-in-process").out
