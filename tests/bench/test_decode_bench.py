"""Decode's shapes are what they say, the append is checked before it is timed, replays are counted right."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from strobe.attention.api import attention
from strobe.attention.cases import decode_shape
from strobe.attention.check import verdict
from strobe.bench import append, decode, decode_figure, document_tables, tables
from strobe.bench.attention import described
from strobe.bench.results import Result
from strobe.bench.timer import repeats
from strobe.ops import cache

SHAPE = decode_shape(2, 50, 4, 2, 32, 8)


def test_a_float8_case_has_the_answer_of_its_scaled_numbers() -> None:
    case = decode.float8(SHAPE)
    inputs = case.inputs(torch.float32, seed=3)
    assert inputs.k.dtype == inputs.v.dtype == torch.float8_e4m3fn
    layout = inputs.options["layout"]
    wide = [
        x.float() * scale[:, None] for x, scale in ((inputs.k, layout.k_scale), (inputs.v, layout.v_scale))
    ]
    plain = SHAPE.inputs(torch.float32, seed=3)
    out = attention(plain.q, *wide, **plain.options)
    assert verdict(inputs.problem, inputs.q, inputs.k, inputs.v, out).right
    torch.testing.assert_close(wide[0].nan_to_num(), plain.k.nan_to_num(), atol=0.3, rtol=0.1)
    assert described(case, "float32")["kv_dtype"] == decode.FLOAT8


def test_mixed_rows_have_one_long_one() -> None:
    lengths = [kv for _, kv in decode.mixed().rows]
    assert len(lengths) == 64
    assert lengths[0] == 65536
    assert all(64 <= n <= 4096 for n in lengths[1:])
    assert "64 rows" not in tables.case_name(described(decode.mixed(), "bfloat16"))
    assert f"{min(lengths)} to 65536" in tables.case_name(described(decode.mixed(), "bfloat16"))


def test_drafts_bring_several_tokens_a_row() -> None:
    case = decode.drafts(decode.mixed(3, 500, (1, 20)), 4)
    assert all(q == 4 <= kv for q, kv in case.rows)
    problem = case.inputs(torch.float32).problem
    assert (problem.q_len, problem.phase) == (4, "decode")


def test_suites_name_every_case_once() -> None:
    for suite in decode.SUITES.values():
        names = [tables.case_name(described(case, "bfloat16")) for case in suite]
        assert len(set(names)) == len(names)
    batches = {len(case.rows) for case in decode.CONTEXT}
    assert batches == {1, 8, 64}


def test_append_rows_are_checked_then_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = list(append.measure(SHAPE, (1, 5), torch.float32, "cpu"))
    ways = ["strobe:append_rotated", "torch:copy_"]
    assert [(row["case"]["tokens"], row["provider"]) for row in rows] == [
        (n, way) for n in (1, 5) for way in ways
    ]
    for row in rows:
        assert row["checked"]
        heads_read, heads_written = 4 + 2 + 2, 4 + 2 + 2
        tokens = row["case"]["tokens"]
        angles, slot = (2 * 32 * 4, 8) if row["provider"] == ways[0] else (0, 0)
        assert row["bytes"] == tokens * ((heads_read + heads_written) * 32 * 4 + angles + slot)
        assert row["gbps"] == pytest.approx(row["bytes"] / row["ms"] * 1e-6)
    honest = cache.append_rotated

    def forgets_the_values(qk, v, *rest):
        return honest(qk, torch.zeros_like(v), *rest)

    monkeypatch.setattr(cache, "append_rotated", forgets_the_values)
    appended, copied = append.measure(SHAPE, (5,), torch.float32, "cpu")
    assert appended["checked"] is False
    assert "ms" not in appended
    assert copied["checked"]


@given(st.integers(1, 30), st.floats(1e-4, 100), st.integers(1, 100), st.floats(0.1, 10))
def test_replays_are_as_many_as_hide_their_start(
    calls: int, once_ms: float, launches: int, long_ms: float
) -> None:
    times = repeats(calls, once_ms, launches, long_ms)
    assert times >= 1
    assert times * calls >= launches or times * calls * once_ms >= 0.999 * long_ms
    if times > 1:  # and no more than that
        fewer = (times - 1) * calls
        assert fewer < launches
        assert fewer * once_ms < long_ms


def test_tables_and_the_figure_of_a_result(tmp_path: Path) -> None:
    rows = [
        {"case": described(case, "bfloat16"), "provider": provider, "checked": True, "gbps": gbps, "ms": 0.1}
        for case in decode.SUITES["all"]
        for provider, gbps in (("strobe:cuda_paged", 4000.0), ("strobe:cuda_split", 1000.0), ("fa3", 3000.0))
    ]
    appended = {**next(iter(append.measure(SHAPE, (3,), torch.float32, "cpu"))), "gbps": 1000.0, "ms": 0.002}
    machine = {"gpu": "X", "ceilings": {"dtype": "bfloat16", "matmul_tflops": 1.0, "read_gbps": 4000.0}}
    result = Result("decode", rows, machine, {}, "abc", "2026-01-01")
    table = document_tables.TABLES["decode"][1](result)
    assert len(table.splitlines()) == 4 + len(decode.SUITES["standard"])
    assert "100 (100%)" in table
    assert "cuda_split" not in table
    assert "cuda_split" in document_tables.TABLES["decode_ladder"][1](result)
    appends = Result("append", [appended], machine)
    (line,) = document_tables.TABLES["append"][1](appends).splitlines()[4:]
    assert "3 tokens" in line
    assert "2 (25%)" in line
    assert decode_figure.drawable(result)
    assert not decode_figure.drawable(Result("decode", rows[:3], machine))
    decode_figure.against_context(result, tmp_path / "x.svg")
    drawn = (tmp_path / "x.svg").read_bytes()
    for text in (b"batch 1", b"batch 8", b"batch 64", b"fa3", b"strobe abc"):
        assert text in drawn
