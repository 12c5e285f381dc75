"""Figures stay readable: labels of many kernels in one column overlap neither one another nor the roof."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from strobe.bench import plots
from strobe.bench.results import Result, Row

MATMUL_TFLOPS, READ_GBPS = 760.0, 4550.0
MACHINE = {
    "gpu": "a machine",
    "ceilings": {"dtype": "bfloat16", "matmul_tflops": MATMUL_TFLOPS, "read_gbps": READ_GBPS},
}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Figure:
    """The figure that the next call draws."""
    monkeypatch.setattr(pyplot, "close", lambda figure: None)
    figure = pyplot.figure()
    monkeypatch.setattr(pyplot, "subplots", lambda *a, **o: _on(figure, *a, **o))
    yield figure
    monkeypatch.undo()
    pyplot.close(figure)


def _on(figure: Figure, *args: int, figsize: tuple[float, float], layout: str, **options: bool) -> object:
    figure.set_size_inches(figsize)
    figure.set_layout_engine(layout)
    return figure, figure.subplots(*args, **options)


def rows(seed: int) -> list[Row]:
    """As many kernels as the real figure has, at speeds as unlike."""
    draw = random.Random(seed)

    def column(count: int, intensity: float, case: dict, prefix: str) -> list[Row]:
        roof = min(MATMUL_TFLOPS, READ_GBPS * intensity * 1e-3)
        return [
            {"case": case, "checked": True, "provider": f"{prefix}kernel_of_name_{i:02}",
             "intensity": intensity, "tflops": min(0.98 * roof, 10 ** draw.uniform(-1, 2.9))}
            for i in range(count)
        ]  # fmt: skip

    return [
        *column(15, 2048.0, {"q_len": 4096}, "strobe:"),
        *column(4, 2048.0, {"q_len": 4096}, "fa"),
        *column(8, 3.99, {"q_len": 1}, "strobe:"),
        *column(4, 0.9998, {"tokens": 1}, "strobe:"),
        *column(3, 1792.3, {"tokens": 4096}, "strobe:"),
    ]


@pytest.mark.parametrize("seed", range(3))
def test_roofline_labels_stay_apart(seed: int, drawn: Figure, tmp_path: Path) -> None:
    given_rows = rows(seed)
    plots.roofline(Result("roofline", given_rows, MACHINE), tmp_path / "roof.png")
    (axis,) = drawn.axes
    labels = [text for text in axis.texts if isinstance(text, Annotation) and "kernel_" in text.get_text()]
    assert len(labels) == len(given_rows)
    texts = [super(Annotation, label).get_window_extent() for label in labels]  # without the leader line
    for (a, box), (b, other) in itertools.combinations(zip(labels, texts, strict=True), 2):
        assert not box.overlaps(other), f"{a.get_text()} over {b.get_text()}"
    for label, box in zip(labels, texts, strict=True):
        assert axis.bbox.x0 <= box.x0 < box.x1 <= axis.bbox.x1, label.get_text()
        _, highest = axis.transData.inverted().transform((box.x0, box.y1))
        assert highest <= MATMUL_TFLOPS, label.get_text()


def test_roofline_draws_right_answers_and_one_shape_a_kernel(drawn: Figure, tmp_path: Path) -> None:
    row = {"case": {"tokens": 1}, "checked": True, "provider": "strobe:a", "intensity": 1.0, "tflops": 2.0}
    wrong = {"case": {"tokens": 1}, "checked": False, "provider": "strobe:wrong"}
    other = {**row, "intensity": 0.99, "tflops": 1.0}
    plots.roofline(Result("roofline", [row, wrong, other], MACHINE), tmp_path / "roof.png")
    texts = [text.get_text() for text in drawn.axes[0].texts]
    assert [text for text in texts if "/s" not in text] == ["a  2"]


@given(
    st.lists(st.floats(-5, 5), min_size=1, max_size=30).map(sorted), st.floats(0.01, 1.0), st.floats(-5, 50)
)
def test_spread_keeps_the_gap_and_the_bound(values: list[float], gap: float, most: float) -> None:
    places = plots._spread(values, gap, most)
    assert len(places) == len(values)
    assert all(b - a >= gap - 1e-9 for a, b in itertools.pairwise(places))
    assert places[-1] <= most + 1e-9


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=30).map(sorted))
def test_spread_moves_nothing_that_has_room(values: list[float]) -> None:
    spaced = [value + 2 * index for index, value in enumerate(values)]
    assert plots._spread(spaced, 1.0, 1000.0) == pytest.approx(spaced)


def test_lines_have_a_color_each_and_a_legend_apart(drawn: Figure, tmp_path: Path) -> None:
    names = [f"strobe:{i}" for i in range(14)] + ["fa3"]
    sweep = [
        {"case": {"kv_len": n}, "provider": name, "ms": n * (i + 1), "tflops": 1.0 + i, "peak_bytes": n}
        for i, name in enumerate(names)
        for n in (512, 1000, 1024)
    ]
    plots.against_length(sweep, tmp_path / "lines.svg", "title")
    for axis in drawn.axes:
        looks = {(line.get_color(), line.get_linestyle()) for line in axis.get_lines()}
        assert len(looks) == len(names)
    (legend,) = drawn.legends
    assert not any(legend.get_window_extent().overlaps(axis.bbox) for axis in drawn.axes)
    assert [tick.get_text() for tick in drawn.axes[0].get_xticklabels()] == ["512", "1000", "1k"]
