"""`strobe bench attention`, `memory`, `roofline` and `strobe ladder` on a CPU, at sizes that take no time."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from strobe.attention import ladder
from strobe.bench import ceilings, peers
from strobe.bench.results import Result

from .conftest import Cli

SMALL = ("--device", "cpu", "--heads", "2", "--head-dim", "32")
ON_CPU = [r.name for r in ladder.PREFILL if "cuda_" not in r.name and "triton_" not in r.name]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's ceilings take seconds to measure; here any will do."""
    monkeypatch.setattr(ceilings, "ceilings", lambda device, dtype: ceilings.Ceilings(dtype, 0.5, 50.0))


def test_attention_gives_one_result_as_json_and_csv_and_file(cli: Cli, tmp_path: Path) -> None:
    shape = (
        "bench",
        "attention",
        *SMALL,
        "--seq",
        "24,40",
        "--sweep",
        "--causal",
        "-k",
        "torch_naive,torch_sdpa",
    )
    saved, figure = tmp_path / "a" / "attention.json", tmp_path / "lines.svg"
    result = json.loads(cli(*shape, "--json", "--save", str(saved), "--plot", str(figure)).out)
    assert [(row["case"]["kv_len"], row["provider"]) for row in result["rows"]] == [
        (length, f"strobe:{name}") for length in (24, 40) for name in ("torch_naive", "torch_sdpa")
    ]
    assert all(row["checked"] and row["case"]["causal"] for row in result["rows"])
    assert Result.load(saved).rows == result["rows"]
    assert b"batch 1, heads 2 x 32, causal, float32" in figure.read_bytes()
    rows = list(csv.DictReader(io.StringIO(cli(*shape, "--csv").out)))
    assert [(row["kv_len"], row["provider"]) for row in rows] == [
        (str(row["case"]["kv_len"]), row["provider"]) for row in result["rows"]
    ]


def test_ladder_times_what_runs_and_tells_what_the_others_need(cli: Cli) -> None:
    lines = cli("ladder", *SMALL, "--seq", "24", "--causal").out.splitlines()
    for rung in ladder.PREFILL:
        (line,) = (line for line in lines if line.startswith(f"{rung.name} "))
        assert bool(re.search("needs an? .*GPU", line)) == (rung.name not in ON_CPU), line
    result = json.loads(cli("ladder", *SMALL, "--seq", "24", "--json").out)
    assert [row["provider"] for row in result["rows"]] == [f"strobe:{name}" for name in ON_CPU]
    assert set(result["refused"]) == {rung.name for rung in ladder.PREFILL} - set(ON_CPU)


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("attention", "--seq", "1k,2k"), "add --sweep"),
        (("attention", "--seq", "1m"), "512 or 4k"),
        (("attention", "--seq", "0"), "length '0'"),
        (("attention", "--suite", "prefil"), "did you mean 'prefill'?"),
        (("attention", "--kernel", "torch_nave"), "did you mean 'torch_naive'?"),
        (("attention", "--kernel", "cuda_split"), "strobe:cuda_split refuses"),
        (("attention", "--vs", "fa9"), "unknown peer 'fa9'"),
        (("attention", "--plot", "x.gif"), "unknown figure format"),
        (("attention", "--tile", "q"), "name=size pairs"),
        (("attention", "--kernel", "torch_naive", "--tile", "q=64"), "torch_naive has no tile size q"),
        (("attention", "--tile", "q=64,k=128"), "nothing runs (dense batch 1, q_len 4096, kv_len 4096"),
        (
            ("attention", "--tile", "q=64,k=128"),
            "strobe:cuda_fused_warp: tensors on cpu; needs an NVIDIA GPU",
        ),
        (("attention", "--tile", "z=64"), "no kernel has tile sizes z"),
        (("attention", "--vs", "sdpa-flash"), "fa2 cannot run here: needs a GPU"),
        (("attention", "--dtype", "int8"), "unknown dtype 'int8'"),
        (("attention", "--dtype", "float64"), "known: float32, bfloat16, float16"),
        (("attention", "--batch", "0"), "nothing to measure (dense batch 0"),
        (("attention", "--host"), "no NVIDIA GPU"),
        (("memory", "--seq", "1k"), "no NVIDIA GPU"),
        (("roofline", "--plot", "x.gif"), "unknown figure format"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_mistake_is_one_line(cli: Cli, args: tuple[str, ...], told: str) -> None:
    device = () if args[0] == "memory" else ("--device", "cpu")
    assert told in cli("bench", *args, *device).error


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("--batch", "0"), "supported: rows and lengths from 1"),
        (("--decode", "--batch", "-1"), "supported: rows and lengths from 1"),
        (("--seq", "0"), "length '0'; supported: 1 to"),
        (("--seq", "4x"), "length '4x'; supported: 1 to"),
        (("--kv-heads", "0"), "--kv-heads"),
    ],
    ids=str,
)
def test_a_ladder_of_nothing_is_one_line(cli: Cli, args: tuple[str, ...], told: str) -> None:
    assert told in cli("ladder", *args, "--device", "cpu").error


def test_a_peer_that_refuses_is_told(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    here = replace(peers.PEERS["fa3"], load=lambda: None)
    monkeypatch.setitem(peers.PEERS, "fa3", here)
    given = cli("bench", "attention", *SMALL, "--seq", "24", "-k", "torch_naive,cuda_split", "--vs", "fa3")
    assert given.code == 0
    assert "strobe:torch_naive" in given.out
    assert "fa3 does not run (dense batch 1" in given.err
    assert "Hopper only" in given.err
    assert "strobe:cuda_split does not run" in given.err
