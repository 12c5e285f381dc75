"""triton_fused on a CPU: its kernel in Triton's interpreter, and its refusals. tests/gpu runs it compiled."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from strobe.attention import triton
from strobe.attention.prefill import triton_fused
from strobe.attention.problem import AttentionProblem, Paged

CASES = (
    "one_token",
    "one_query",
    "tile_plus_one_causal",
    "odd",
    "odd_causal",
    "mqa_causal",
    "long_keys_causal",
    "more_queries_than_keys_causal",
    "no_keys",
    "scale",
    "large_scores_causal",
    "equal_scores",
    "several_tiles_causal",
    "packed",
    "packed_causal",
)


@pytest.fixture(scope="module")
def verdicts() -> dict[str, Any]:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton, which Linux alone has: pip install triton")
    program = Path(__file__).with_name("interpreted.py")
    done = subprocess.run(
        [sys.executable, str(program), *CASES],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", [*CASES, "nan_in_the_next_row"])
def test_interpreted(name: str, verdicts: dict[str, Any]) -> None:
    assert verdicts[name]["right"], verdicts[name]["why"]


PLAIN = AttentionProblem(2, 64, 64, 4, 2, 64, dtype="bfloat16", device="cuda", arch=90)


def test_runs_a_plain_problem() -> None:
    assert triton_fused.refusals(PLAIN) == []
    assert triton_fused.refusals(replace(PLAIN, causal=True)) == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"head_dim": 80}, "head_dim 80"),
        ({"dtype": "float32"}, "float32"),
        ({"window": (32, 0)}, "window (32, 0)"),
        ({"softcap": 20.0}, "softcap"),
        ({"sinks": (0.0,) * 4}, "sinks"),
        ({"scale": 0.0}, "scale 0.0"),
        ({"layout": Paged(None, None), "page_size": 16}, "paged"),
        ({"arch": 75}, "compute capability 7.5; supported: 8.0 and up"),
        ({"batch": 40_000}, "batch x q_heads 160000; supported: up to 65535"),
        ({"kv_dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
    ],
)
def test_refuses_by_name(change: dict[str, Any], named: str) -> None:
    reasons = triton_fused.refusals(replace(PLAIN, **change))
    assert len(reasons) == 1
    assert named in reasons[0]


def test_says_what_a_cpu_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = replace(PLAIN, dtype="float16", kv_dtype="float16", device="cpu", arch=0)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "TRITON_INTERPRET=1" in triton_fused.refusals(problem)[0]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_fused.refusals(problem) == []


def test_says_that_triton_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    triton._installed.cache_clear()
    try:
        assert any("triton is not installed" in reason for reason in triton_fused.refusals(PLAIN))
    finally:
        triton._installed.cache_clear()
