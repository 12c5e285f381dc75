"""The engine's suite: rows as the results want them, a floor that is one, a vLLM kept at arm's length."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from strobe.bench import engine_peers, engine_suite, engine_tables, floor, vllm
from strobe.bench.ceilings import Ceilings
from strobe.bench.engine_cases import Batch, Load, Network
from strobe.bench.results import Result
from strobe.engine import EngineConfig
from strobe.errors import StrobeError
from strobe.models import shapes
from strobe.models.config import ModelConfig

SMALL = replace(
    shapes.SHAPES["llama3.2-1b"], layers=2, hidden=64, intermediate=96, q_heads=4, kv_heads=2, head_dim=16,
    vocab_size=200, max_position=64,
)  # fmt: skip
ROOF = Ceilings("float32", 1.0, 100.0)
NETWORK = Network(SMALL, torch.float32, ROOF)
TORCH = {"attention_kernel": "torch_naive", "linear_kernel": "torch_linear"}
"""Kernels that need no compiling."""
CASES = (Batch(2, 5, 6), Load(3, (2, 9), (2, 7)))

FAKE = """
import time, types

class SamplingParams:
    def __init__(self, temperature, ignore_eos, max_tokens, detokenize):
        assert (temperature, ignore_eos, detokenize) == (0, True, False)
        self.max_tokens = max_tokens

class LLM:
    def __init__(self, model, load_format, skip_tokenizer_init, dtype, max_model_len, **options):
        assert load_format == "dummy" and open(model + "/config.json").read()
        print("noise on stdout")

    def generate(self, prompts, params, use_tqdm):
        {behave}
        time.sleep(0.001 * max(p.max_tokens for p in params))
        answers = [types.SimpleNamespace(token_ids=[1] * p.max_tokens) for p in params]
        return [types.SimpleNamespace(outputs=[answer]) for answer in answers]

__version__ = "0.0"
"""


@pytest.fixture
def fake_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def install(behave: str = "pass") -> None:
        (tmp_path / "vllm").mkdir()
        (tmp_path / "vllm" / "__init__.py").write_text(FAKE.replace("{behave}", behave))
        monkeypatch.setenv("VLLM_PYTHONPATH", str(tmp_path))

    return install


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shapes.SHAPES, "llama3.2-1b", SMALL)


def measure(*peers: str, cases=CASES, options=TORCH) -> list[dict]:
    return list(
        engine_suite.measure(
            "llama3.2-1b", engine_suite.Plan(cases, 2, peers), ROOF, device="cpu", dtype="float32",
            configure=lambda context: EngineConfig(max_model_len=context, kv_cache_pages=64, **options),
        )
    )  # fmt: skip


def test_rows_of_every_engine(fake_vllm) -> None:
    fake_vllm()
    rows = measure("transformers", "vllm")
    assert [(row["provider"], "requests" in row["case"]) for row in rows] == [
        ("strobe", False), ("transformers", False), ("strobe", True), ("vllm", False), ("vllm", True),
    ]  # fmt: skip
    batch = {
        "model": "llama3.2-1b",
        "weights": "random",
        "batch": 2,
        "prompt": 5,
        "output": 6,
        "dtype": "float32",
    }
    assert rows[0]["case"] == rows[1]["case"] == rows[3]["case"] == batch
    assert rows[2]["case"] == rows[4]["case"]
    assert [row["checked"] for row in rows] == [True, True, True, None, None]
    for row in rows:
        assert row.get("tok_s", 0) > 0, row
        assert row["floor_percent"] > 0
    assert rows[3]["version"] == "0.0"
    assert rows[0]["engine"]["kv_cache_pages"] == 64
    assert "seed" not in rows[0]["engine"]
    table = engine_tables.table(rows)
    assert f"{rows[0]['tok_s'] / rows[3]['tok_s']:.2f}" in table
    assert "3 requests, prompts 2 to 9, outputs 2 to 7" in table


def test_what_determinism_costs_stands_beside_the_rows_without_it() -> None:
    rows = measure()
    exact = measure(options={"deterministic": True})
    assert {row["provider"] for row in exact} == {"strobe, deterministic"}
    both = engine_suite.merged(Result("engine", rows), exact)
    assert both == [*({"commit": "", **row} for row in rows), *exact]
    assert "| strobe, deterministic |" in engine_tables.table(both)


def test_figures_come_from_the_middle_runs() -> None:
    figures = Batch(4, 10, 11).figures([[0.3, 0.1, 0.2], [1.2, 0.7, 9.0]], NETWORK)
    assert figures["ttft_ms"] == pytest.approx(200)
    assert (figures["ttft_ms_min"], figures["ttft_ms_max"]) == pytest.approx((100, 300))
    assert figures["tpot_ms"] == pytest.approx(100)
    assert figures["tok_s"] == pytest.approx(40)
    moved = floor.decode_bytes(SMALL, torch.float32, 4, 10, 11)
    assert figures["gbps"] == pytest.approx(moved / 0.1 * 1e-9)
    assert figures["floor_percent"] == pytest.approx(moved / 0.1 * 1e-9)  # of 100 GB/s


def test_wrong_tokens_have_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = engine_peers.Strobe.many

    def wrong(self, prompts, outputs):
        return [tuple((t + 1) % 200 for t in tokens) for tokens in honest(self, prompts, outputs)]

    monkeypatch.setattr(engine_peers.Strobe, "many", wrong)
    for row in measure():
        assert row["checked"] is False
        assert "tok_s" not in row
        assert "WRONG" in engine_tables.line(row)


@pytest.mark.parametrize(
    ("behave", "told"),
    [
        ("raise MemoryError('no room')", "MemoryError: no room"),
        ("import os; os._exit(3)", "exit code 3"),
        ("return []", "wrote 0 tokens of 2"),
    ],
)
def test_what_goes_wrong_in_vllm_is_a_row(fake_vllm, behave: str, told: str) -> None:
    fake_vllm(behave)
    rows = [row for row in measure("vllm", cases=CASES[:1]) if row["provider"] == "vllm"]
    assert [told in row["failed"] for row in rows] == [True]
    assert "failed" in engine_tables.table(rows)


def test_a_vllm_that_hangs_is_stopped_with_its_children(fake_vllm) -> None:
    fake_vllm("import subprocess; subprocess.Popen(['sleep', '60']).wait()")
    jobs = CASES[0].jobs(200, 1)
    found, about = vllm.measure(SMALL, "float32", jobs, max_model_len=64, timeout_s=2.0)
    assert found == ["stopped after 2 s"] * 2
    assert about["version"] == "0.0"


def test_no_vllm_is_told_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VLLM_PYTHONPATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr(vllm.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(StrobeError, match="vllm is not installed"):
        vllm.check_installed()


@pytest.mark.parametrize(
    ("shape", "gigabytes"), [("llama3.2-1b", 2.47), ("llama2-7b", 13.2), ("llama3-8b", 15.0)]
)
def test_the_floor_of_published_shapes(shape: str, gigabytes: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the published sizes
    config = shapes.named(shape)
    assert floor.step_weight_bytes(config, torch.bfloat16) == pytest.approx(gigabytes * 1e9, rel=0.01)


def counted(config: ModelConfig, batch: int, prompt: int, output: int) -> float:
    """Bytes of all decode steps, step by step, layer by layer."""
    total = 0
    for step in range(1, output):
        total += floor.step_weight_bytes(config, torch.float16)
        for layer in range(config.layers):
            window = config.window(layer)[0]
            keys = prompt + step if window < 0 else min(prompt + step, window + 1)
            total += batch * 2 * keys * config.kv_heads * config.head_dim * 2
    return total


@pytest.mark.parametrize("window", [None, 9])
def test_bytes_of_a_step_are_the_mean_over_its_steps(window: int | None) -> None:
    config = replace(SMALL, sliding_window=window, sliding_layers=frozenset([1]) if window else None)
    got = floor.decode_bytes(config, torch.float16, 3, 7, 12)
    assert got * 11 == pytest.approx(counted(config, 3, 7, 12))


def test_the_floor_of_a_load_is_below_any_order_of_its_steps() -> None:
    prompts, outputs = [5, 30, 11], [9, 2, 14]
    one_by_one = sum(
        counted(SMALL, 1, prompt, output) for prompt, output in zip(prompts, outputs, strict=True)
    )
    least = floor.load_seconds(SMALL, torch.float16, prompts, outputs, ROOF)
    assert 0 < least < one_by_one / 100e9 + 14 * 1e-6
    slow = floor.load_seconds(SMALL, torch.float16, prompts, outputs, Ceilings("float16", 1e-6, 100.0))
    assert slow > 1000 * least  # then the operations bind


def test_an_earlier_files_other_rows_are_kept() -> None:
    rows = measure(cases=CASES[:1])
    other = {**rows[0], "case": {**rows[0]["case"], "model": "llama3-8b"}}
    stale, peer = {**rows[0], "tok_s": 0.0}, {**rows[0], "provider": "vllm"}
    before = Result.here("engine", [other, stale, {"commit": "older", **peer}], commit="old")
    kept = {"commit": "older", **peer}, {"commit": "old", **other}
    merged = engine_suite.merged(before, rows)
    assert merged == [kept[0], rows[0], kept[1]]
    assert Result.here("engine", merged, commit="new").commits == "new and older and old"
    assert engine_suite.merged(None, rows) == rows


@pytest.mark.parametrize("case", [{"batch": 0}, {"prompt": 0}, {"output": 1}], ids=str)
def test_a_batch_that_cannot_be_is_refused(case: dict) -> None:
    with pytest.raises(StrobeError, match="supported"):
        Batch(**case)
