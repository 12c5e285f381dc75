"""A profile's arithmetic on spans that are known, and a real one of a small model on the CPU."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from strobe.bench import floor
from strobe.bench.ceilings import Ceilings
from strobe.bench.engine_cases import Batch
from strobe.bench.profile import Span, kind_of, profile, summary
from strobe.bench.subject import subject
from strobe.engine import EngineConfig


def test_times_kinds_and_gaps_of_known_spans() -> None:
    spans = [
        Span("attend", 100.0, 110.0), Span("gemm_x", 110.0, 125.0), Span("append", 130.0, 131.0),
        Span("attend", 200.0, 212.0), Span("gemm_x", 205.0, 240.0), Span("thing", 240.5, 241.0),
    ]  # fmt: skip
    found = summary(spans, 2, {})
    assert found.step_us == pytest.approx((241 - 100) / 2)
    assert found.busy_us == pytest.approx((25 + 1 + 40 + 0.5) / 2)  # what overlaps counts once
    assert found.gaps == 3
    first = found.largest_gaps[0]
    assert (first.us, first.after, first.before) == (69.0, "append", "attend")
    assert {part.name: (part.calls, part.us, part.beside_us) for part in found.kinds} == {
        "products with the weights": (1, (15 + 28) / 2, 7 / 2), "attention": (1, 11, 0),
        "append": (0.5, 0.5, 0), "other": (0.5, 0.25, 0),
    }  # fmt: skip
    assert [part.name for part in found.kernels] == ["gemm_x", "attend", "append", "thing"]


@given(st.lists(st.tuples(st.floats(0, 1000), st.floats(0.1, 50)), min_size=1, max_size=30))
def test_busy_time_and_gaps_fill_the_whole(times: list[tuple[float, float]]) -> None:
    found = summary([Span("x", start, start + length) for start, length in times], 1, {})
    covered = 0.0
    points = sorted({point for start, length in times for point in (start, start + length)})
    for low, high in itertools.pairwise(points):
        covered += (high - low) * any(s <= low and high <= s + n for s, n in times)
    assert found.busy_us == pytest.approx(covered, rel=1e-6, abs=1e-6)
    assert found.step_us == pytest.approx(points[-1] - points[0])
    assert sum(gap.us for gap in found.largest_gaps) <= found.step_us - found.busy_us + 1e-6
    (part,) = found.kernels
    assert part.us == pytest.approx(found.busy_us)
    assert part.us + part.beside_us == pytest.approx(sum(length for _, length in times))


def test_parts_sum_to_the_busy_time_where_launches_wait_for_one_another() -> None:
    """Each launch stands beside the end of the one ahead, and a short one within a long one."""
    spans = [Span("project", 0, 10), Span("attend", 1, 14), Span("append", 2, 5), Span("project", 12, 20)]
    found = summary(spans, 1, {})
    assert found.busy_us == found.step_us == 20
    assert {part.name: (part.us, part.beside_us) for part in found.kernels} == {
        "project": (10 + 6, 2), "attend": (4, 9), "append": (0, 3),
    }  # fmt: skip
    assert found.gaps == 0


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("attend", "attention"),
        ("nvjet_tst_128x8_64x12_4x1_v_bz_TNT", "products with the weights"),
        ("project", "products with the weights"),
        ("append", "append"),
        ("sample", "sampling"),
        ("rms_norm", "norms and activations"),
        ("Memcpy HtoD", "copies"),
        ("vectorized_elementwise_kernel", "other"),
    ],
)
def test_kinds_of_names(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_decode_steps_of_a_model(tmp_path: Path) -> None:
    config = EngineConfig(attention_kernel="torch_sdpa", linear_kernel="torch_linear")
    measured = subject(None, None, device="cpu", config=config)
    case, trace = Batch(2, 9, 30), tmp_path / "trace.json"
    found = profile(measured, case, steps=3, roof=Ceilings("float32", 1.0, 10.0), trace=trace)
    assert not measured.engine.has_work
    parts = {part.name: part for part in found.kinds}
    products = parts["products with the weights"]
    assert products.bytes == floor.step_weight_bytes(measured.model.config, torch.float32)
    assert products.floor_percent == pytest.approx(100 * products.bytes / 10e9 / (products.us * 1e-6))
    assert 0 < found.busy_us <= found.step_us
    assert found.floor_us == pytest.approx((products.bytes + parts["attention"].bytes) / 10e9 * 1e6)
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert "strobe decode step" in names
