"""`strobe bench decode` on a CPU, at sizes that take no time."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from strobe.bench import append, ceilings
from strobe.bench.results import Result

from .conftest import Cli

SMALL = ("bench", "decode", "--device", "cpu", "--heads", "4", "--kv-heads", "2", "--head-dim", "32")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "ceilings", lambda device, dtype: ceilings.Ceilings(dtype, 0.5, 50.0))


def test_contexts_as_table_json_csv_file_and_figure(cli: Cli, tmp_path: Path) -> None:
    saved, figure = tmp_path / "a" / "decode.json", tmp_path / "lines.svg"
    shape = (*SMALL, "--batch", "3", "--context", "40,70,200", "--page-size", "8")
    shape += ("--kernel", "torch_grouped")
    result = json.loads(cli(*shape, "--json", "--save", str(saved), "--plot", str(figure)).out)
    assert [(row["case"]["kv_len"], row["case"]["page_size"]) for row in result["rows"]] == [
        (40, 8), (70, 8), (200, 8)
    ]  # fmt: skip
    assert all(row["checked"] and row["gbps"] > 0 for row in result["rows"])
    assert Result.load(saved).rows == result["rows"]
    assert b"batch 3" in figure.read_bytes()
    rows = list(csv.DictReader(io.StringIO(cli(*shape, "--csv").out)))
    assert [row["kv_len"] for row in rows] == ["40", "70", "200"]
    (line,) = (line for line in cli(*shape).out.splitlines() if "1 x 70" in line)
    assert "torch_grouped" in line
    assert "page 8" in line


def test_the_append_alone(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(append, "TOKENS", (1, 3))
    rows = json.loads(cli(*SMALL, "--suite", "append", "--json").out)["rows"]
    assert [(row["case"]["tokens"], row["provider"]) for row in rows] == [
        (1, "strobe:append_rotated"), (1, "torch:copy_"), (3, "strobe:append_rotated"), (3, "torch:copy_")
    ]  # fmt: skip
    assert all(row["checked"] and row["gbps"] > 0 for row in rows)


def test_mixed_lengths(cli: Cli) -> None:
    told = cli(*SMALL, "--batch", "4", "--context", "500", "--mixed", "-k", "torch_grouped", "--json").out
    case = json.loads(told)["rows"][0]["case"]
    assert (case["batch"], case["q_len"], case["kv_len"]) == (4, 1, 500)
    assert 64 <= case["kv_len_min"] < 500
    assert 500 + 3 * 64 <= case["kv_tokens"] < 4 * 500


def test_a_dense_cache(cli: Cli) -> None:
    dense = (*SMALL, "--batch", "2", "--context", "77", "--page-size", "0", "-k", "torch_naive")
    (row,) = json.loads(cli(*dense, "--json").out)["rows"]
    assert (row["case"]["q_len"], row["case"]["kv_len"], row["checked"]) == (1, 77, True)
    assert "page_size" not in row["case"]
    assert "one length" in cli(*dense, "--mixed").error


def test_nothing_that_runs_is_told(cli: Cli) -> None:
    assert "nothing runs" in cli(*SMALL, "--float8").error


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("--suite", "standart"), "did you mean 'standard'?"),
        (("--context", "1m"), "512 or 4k"),
        (("--batch", "0"), "batch 0"),
        (("--kernel", "torch_groupd"), "did you mean 'torch_grouped'?"),
        (("--kernel", "cuda_paged"), "strobe:cuda_paged refuses"),
        (("--vs", "fa9"), "unknown peer 'fa9'"),
        (("--plot", "x.gif"), "unknown figure format"),
        (("--dtype", "int8"), "unknown dtype 'int8'"),
        (("--suite", "append", "--page-size", "0"), "supported: pages"),
    ],
    ids=" ".join,
)
def test_mistake_is_one_line(cli: Cli, args: tuple[str, ...], told: str) -> None:
    assert told in cli(*SMALL, *args).error
