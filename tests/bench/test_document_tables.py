"""Tables and the figure of what is measured of the engine, and places for results that are not there yet."""

from __future__ import annotations

from pathlib import Path

import pytest

from strobe.bench import document, engine_figure
from strobe.bench.document_tables import TABLES
from strobe.bench.results import Result

MACHINE = {"gpu": "X", "ceilings": {"dtype": "bfloat16", "matmul_tflops": 1.0, "read_gbps": 100.0}}


def result(bench: str, *rows: dict) -> Result:
    return Result(bench, list(rows), MACHINE, {"torch": "2"}, "abc", "2026-01-01T00:00:00Z")


def engine_row(provider: str, batch: int, **figures: float) -> dict:
    case = {
        "model": "llama3-8b",
        "weights": "random",
        "batch": batch,
        "prompt": 9,
        "output": 7,
        "dtype": "bfloat16",
    }
    return {"case": case, "provider": provider, "checked": True, "ttft_ms": 5.0, **figures}


ENGINE = result(
    "engine",
    engine_row("strobe", 1, tpot_ms=2.0, tok_s=500.0, gbps=80.0, floor_percent=80.0),
    engine_row("vllm", 1, tpot_ms=4.0, tok_s=250.0, gbps=40.0, floor_percent=40.0),
    engine_row("vllm-in-process", 1, tpot_ms=2.5, tok_s=400.0, gbps=64.0, floor_percent=64.0),
    engine_row("strobe", 8, tpot_ms=2.0, tok_s=4000.0, gbps=81.0, floor_percent=81.0),
    {**engine_row("vllm", 8), "failed": "OutOfMemoryError: none left"},
)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_strobe_stands_beside_the_faster_vllm() -> None:
    lines = [cells(line) for line in TABLES["engine"][1](ENGINE).splitlines()[4:]]
    assert lines[0][2:] == ["strobe", "5", "2", "500", "80", "80 %", "1.25"]
    assert lines[2][2:] == ["vllm-in-process", "5", "2.5", "400", "64", "64 %", ""]
    assert lines[3][-1] == ""  # nothing to compare with
    assert lines[4][2:4] == ["vllm", "failed"]


def test_the_engines_figure_tells_its_result(tmp_path: Path) -> None:
    assert engine_figure.drawable(ENGINE)
    assert not engine_figure.drawable(result("engine", ENGINE.rows[-1]))
    engine_figure.against_floor(ENGINE, tmp_path / "a.svg")
    engine_figure.against_floor(ENGINE, tmp_path / "b.svg")
    drawn = (tmp_path / "a.svg").read_bytes()
    assert drawn == (tmp_path / "b.svg").read_bytes()
    for text in (b"llama3-8b", b"vllm-in-process", b"4,000", b"strobe abc"):
        assert text in drawn


def test_tables_of_start_up_kernels_and_agreement() -> None:
    case = {"model": "llama3-8b", "weights": "random", "prompt": 128, "dtype": "bfloat16"}
    phases = {"import_s": 1.0, "network_s": 2.0, "engine_s": 0.5, "first_token_s": 0.25, "total_s": 3.75}
    started = result("startup", {"case": {**case, "cache": "warm"}, **phases})
    (line,) = TABLES["startup"][1](started).splitlines()[4:]
    assert cells(line) == ["llama3-8b (random weights)", "warm", "1", "2", "0.5", "0.25", "3.75"]
    source = {"source": "ops/cache", "arch": "sm_90a", "variants": 12}
    times = {"compile_s": 0.5, "load_ms": 3.0, "load_ms_median": 1.0, "on_gpu": True}
    table = TABLES["kernels"][1](result("kernels", {"case": source, **times}))
    assert "load onto the GPU" in table
    assert cells(table.splitlines()[-1]) == ["`ops/cache`", "12", "0.5", "3", "1"]
    used = {
        "case": {"rung": "decode/x", "arch": "sm_90a"},
        "checked": True,
        "first_s": 2.5,
        "later_ms": 31.25,
    }
    table = TABLES["first_use"][1](result("kernels", used))
    assert cells(table.splitlines()[-1]) == ["`decode/x`", "2.5", "31.2"]
    difference = {"strobe_logprob": -2.5, "transformers_logprob": -2.25}
    verified = {
        "case": {"model": "gpt2", "dtype": "bfloat16"}, "model": "gpt2", "checked": False, "positions": 9,
        "same_choice": 8, "greedy_equal": 3, "greedy_tokens": 6, "differences": [difference],
        "logit_difference": 0.5, "largest_logit": 4.0,
    }  # fmt: skip
    (line,) = TABLES["verify"][1](result("verify", verified)).splitlines()[4:]
    assert cells(line) == ["gpt2", "0.5 of 4", "8 of 9", "3 of 6", "0.25", "NO"]


def test_a_result_that_may_be_missing_has_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text("<!-- results: x/engine? -->\nold\n<!-- end -->\n")
    assert document.main([]) == 0
    assert "Not measured yet" in readme.read_text()
    ENGINE.save(tmp_path / "benchmarks" / "results" / "x" / "engine.json")
    assert document.main(["--check"]) == 1
    assert document.main([]) == 0
    assert "1.25" in readme.read_text()
    assert "Not measured" not in readme.read_text()
    assert (tmp_path / "benchmarks" / "results" / "x" / "engine.svg").is_file()
    assert document.main(["--check"]) == 0


def test_the_hosts_share_stands_beside_the_peers() -> None:
    case = {"batch": 1, "q_len": 9, "kv_len": 9, "q_heads": 2, "kv_heads": 2, "head_dim": 64, "causal": True}
    rows = [
        {"case": {**case, "dtype": "bfloat16"}, "provider": name, "host_us": us, "host_us_min": us - 1}
        for name, us in (("strobe", 7.25), ("fa3", 30.5))
    ]
    _, make = TABLES["host"]
    table = make(Result("host", rows)).splitlines()
    assert table[2].split("|")[2:4] == [" strobe   ", " fa3  "]
    assert table[4].split("|")[1:4] == [" batch 1, 9, heads 2 x 64, causal ", " **7.25** ", " 30.5 "]
