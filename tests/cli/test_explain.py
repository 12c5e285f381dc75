from __future__ import annotations

import json
import shlex

import pytest

from strobe.attention import AttentionProblem, ladder

from .conftest import Cli

DECODE = shlex.split(
    "--q-len 1 --kv-len 4096 --q-heads 32 --kv-heads 8 --head-dim 128 --causal --page-size 16"
)


def test_verdict_of_every_kernel(cli: Cli) -> None:
    found = json.loads(cli("explain", "--device", "cpu", "--json").out)
    problem = AttentionProblem(1, 1024, 1024, 32, 32, 128)
    assert found["refusals"] == ladder.explain(problem)
    assert found["chosen"] == str(ladder.choose(problem))
    assert found["flops"] == 4 * 1024 * 1024 * 32 * 128


def test_decode_shape_over_pages(cli: Cli) -> None:
    found = json.loads(cli("explain", *DECODE, "--device", "cpu", "--json").out)
    assert found["phase"] == "decode"
    assert found["bytes"] == 2 * (2 * 4096 * 8 * 128 + 2 * 32 * 128)


def test_another_machine_can_be_asked_for(cli: Cli) -> None:
    text = cli("explain", *DECODE, "--arch", "90").out
    assert "on cuda" in text
    assert "decode" in text
    assert all(name in text for name in ladder.RUNGS)
    assert sum(line.startswith("*") for line in text.splitlines()) == 1


def test_text_names_reasons_and_ideas(cli: Cli) -> None:
    outcome = cli("explain", "--softcap", "30", "--device", "cpu")
    assert "no softcap" in outcome.out
    assert outcome.err == ""


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--kv-heads", "5"], "not a multiple of kv_heads 5"),
        (["--dtype", "int8"], "dtype int8"),
        (["--batch", "-1"], "batch is -1"),
        (["--batch", "-1", "--page-size", "16"], "batch -1"),
        (["--q-len", "-1"], "q_len is -1"),
        (["--page-size", "-2"], "page_size is -2"),
        (["--arch", "-90"], "arch is -90"),
        (["--window", "-2", "0"], "window"),
        (["--q-len", "1" + "0" * 30], "q_len is 1000"),
        (["--page-size", "16", "--batch", "2147483647"], "batch 2147483647"),
        (["--page-size", "16", "--kv-len", "1" + "0" * 30], "kv_len 1000"),
        (["--softcap", "nan"], "softcap nan"),
        (["--device", "cuda:99"], "cuda:99"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_shape_that_is_none(cli: Cli, args: list[str], told: str) -> None:
    assert told in cli("explain", *args).error


def test_largest_shape(cli: Cli) -> None:
    """Costs are formulas: no list of two thousand million rows is made."""
    largest = str(2**31 - 1)
    told = json.loads(cli("explain", "--batch", largest, "--q-len", largest, "--json").out)
    assert told["flops"] == 4 * (2**31 - 1) ** 3 * 32 * 128


@pytest.mark.parametrize("kv_len", ["0", "1"])
def test_smallest_shapes(cli: Cli, kv_len: str) -> None:
    for paged in ([], ["--page-size", "16"]):
        assert cli("explain", "--batch", "0", "--kv-len", kv_len, *paged).code == 0
