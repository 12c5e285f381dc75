"""The decode rungs where there is no GPU: Triton's interpreter, refusals, and the shapes that are chosen."""

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
from hypothesis import given
from hypothesis import strategies as st

from strobe.attention import ladder, paged
from strobe.attention.decode import cuda_cluster, cuda_paged, cuda_single, cuda_split, triton_split
from strobe.attention.problem import DECODE_MAX_Q_LEN, AttentionProblem, Dense, Packed, Paged

CASES = {"paged_decode", "paged_decode_mha", "paged_decode_mqa", "paged_page_1", "paged_page_256"}


def test_triton_split_in_the_interpreter() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton, which Linux alone has: pip install triton")
    program = Path(__file__).with_name("interpreted_decode.py")
    done = subprocess.run(
        [sys.executable, str(program)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stderr
    verdicts = json.loads(done.stdout)
    assert set(verdicts) >= CASES
    assert [f"{case}: {each['why']}" for case, each in verdicts.items() if not each["right"]] == []


def problem(**changes: object) -> AttentionProblem:
    sizes = {"batch": 2, "q_len": 1, "kv_len": 100, "q_heads": 8, "kv_heads": 2, "head_dim": 128}
    rest = {"layout": Paged(None, None), "page_size": 16, "device": "cuda", "arch": 90}
    return AttentionProblem(**{**sizes, **rest, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "rung", [cuda_single, cuda_split, triton_split, cuda_paged, cuda_cluster], ids=lambda r: r.__name__
)
def test_accepts_the_plain_problem(rung: object) -> None:
    assert rung.refusals(problem()) == []  # type: ignore[attr-defined]


SETTLED = Paged(None, None, settled=True)
DENSE = {"layout": Dense(), "page_size": 0}
PACKED = {"layout": Packed(None, None), "page_size": 0}


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        ({"batch": 1}, "cuda_cluster"),
        ({"batch": 1, "kv_len": 2048}, "cuda_cluster"),
        ({"batch": 1, "kv_len": 2049}, "cuda_paged"),
        ({"batch": 1, "kv_len": 4096, "kv_dtype": "float8_e4m3fn"}, "cuda_cluster"),
        ({"batch": 1, "kv_len": 512, "q_heads": 32, "kv_heads": 32}, "cuda_cluster"),
        ({"batch": 1, "kv_len": 513, "q_heads": 32, "kv_heads": 32}, "cuda_paged"),
        ({"batch": 1, "kv_len": 8192, "layout": SETTLED}, "cuda_cluster"),
        ({"batch": 1, "kv_len": 8193, "layout": SETTLED}, "cuda_paged"),
        ({"batch": 1, "kv_len": 1024, "q_heads": 32, "kv_heads": 32, "layout": SETTLED}, "cuda_cluster"),
        ({"batch": 1, "kv_len": 1025, "q_heads": 32, "kv_heads": 32, "layout": SETTLED}, "cuda_paged"),
        ({"batch": 2}, "cuda_paged"),
        ({"batch": 2, "head_dim": 80, "kv_dtype": "float8_e4m3fn"}, "cuda_paged"),
        ({"batch": 1, "q_len": 2}, "cuda_paged"),
        ({"batch": 1, "arch": 80}, "cuda_async"),
        ({**DENSE, "batch": 1, "kv_len": 2048}, "cuda_cluster"),
        ({**DENSE, "batch": 1, "kv_len": 2049}, "cuda_paged"),
        ({**DENSE, "q_len": DECODE_MAX_Q_LEN}, "cuda_paged"),
        ({**DENSE, "q_len": DECODE_MAX_Q_LEN + 1}, "cuda_hopper"),
        ({**DENSE, "q_len": 16, "batch": 64, "q_heads": 32, "kv_heads": 8}, "cuda_async"),
        ({**DENSE, "q_len": 4, "batch": 64, "q_heads": 32, "kv_heads": 8}, "cuda_paged"),
        ({**DENSE, "q_len": 8, "batch": 8, "q_heads": 32, "kv_heads": 8}, "cuda_paged"),
        ({"q_len": 16, "batch": 64, "q_heads": 32, "kv_heads": 8}, "cuda_paged"),
        ({**DENSE, "arch": 80}, "cuda_async"),
        ({**PACKED, "q_len": 1}, "cuda_hopper"),
    ],
    ids=str,
)
def test_what_auto_takes(change: dict[str, object], taken: str) -> None:
    assert ladder.choose(problem(**change)).name == taken


@pytest.mark.parametrize("rung", [cuda_paged, cuda_cluster], ids=lambda r: r.__name__)
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"arch": 80}, "bulk copies"),
        ({"arch": 120}, "227 KiB of shared memory"),
        ({"head_dim": 72}, "head_dim 72"),
        ({"q_len": 17}, "q_len 17"),
        ({"page_size": 512}, "page_size 512"),
        ({**DENSE, "kv_len": 0}, "kv_len 0"),
        (PACKED, "k and v packed"),
        ({"dtype": "float32"}, "dtype float32"),
        ({"kv_dtype": "float32"}, "cache in float32"),
        ({"batch": 70_000}, "batch 70000"),
    ],
)
def test_paged_rungs_say_why_not(rung: Any, change: dict[str, object], reason: str) -> None:
    (why,) = rung.refusals(problem(**change))
    assert reason in why


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"q_len": 2}, "one query"),
        ({"softcap": 3.0}, "softcap"),
        ({"window": (5, 0)}, "window (5, 0)"),
        ({"batch": 70_000}, "batch 70000, q_heads 8; supported: up to 65535"),
        ({"arch": 75}, "compute capability 7.5; supported: 8.0 and up"),
    ],
)
@pytest.mark.parametrize("rung", [cuda_single, cuda_split, triton_split], ids=lambda r: r.__name__)
def test_teaching_rungs_say_why_not(rung: Any, change: dict[str, object], reason: str) -> None:
    (why,) = rung.refusals(problem(**change))
    assert reason in why


@given(
    head_dim=st.sampled_from(paged.HEAD_DIMS),
    group=st.sampled_from([1, 3, 4, 8, 16, 64]),
    kv_heads=st.sampled_from([1, 2, 3, 8]),
    q_len=st.integers(1, DECODE_MAX_Q_LEN),
    page_size=st.integers(0, paged.MAX_PAGE_SIZE),
    batch=st.integers(1, cuda_paged.MAX_BATCH),
    kv_dtype=st.sampled_from([None, "float8_e4m3fn"]),
)
def test_every_accepted_problem_has_a_shape_that_fits(
    head_dim: int, group: int, kv_heads: int, q_len: int, page_size: int, batch: int, kv_dtype: str | None
) -> None:
    described = problem(
        head_dim=head_dim, q_heads=group * kv_heads, kv_heads=kv_heads, q_len=q_len, page_size=page_size,
        batch=batch, kv_dtype=kv_dtype, layout=Paged(None, None) if page_size else Dense(),
    )  # fmt: skip
    if cuda_paged.refusals(described):
        return
    shape, cluster = cuda_paged.choose_shape(described), cuda_cluster.choose_shape(described)
    assert shape.shared_bytes(batch) <= 227 * 1024
    assert cluster.shared_bytes() + 1024 <= 228 * 1024 // cluster.blocks
    assert kv_heads % shape.heads == 0
    assert shape.warps % shape.heads == 0
    for tiles in (shape, cluster):
        assert page_size % tiles.run == 0
        assert tiles.keys % tiles.run == 0
        assert tiles.stages >= 1
    assert cluster == cuda_cluster.choose_shape(replace(described, batch=batch + 7))


@pytest.mark.parametrize("rung", [cuda_paged, cuda_cluster], ids=lambda r: r.__name__)
def test_only_what_is_settled_is_read_early(rung: Any) -> None:
    assert rung.choose_shape(problem(layout=Paged(None, None, settled=True))).settled
    assert not rung.choose_shape(problem()).settled
    assert not rung.choose_shape(problem(**DENSE)).settled
