"""Figures made from result rows: lines against length, bars, and the roofline. Needs the extra `plots`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from strobe.bench.results import Row
from strobe.errors import MissingExtraError, StrobeError

FORMATS = (".png", ".svg", ".pdf")


def _pyplot() -> Any:
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise MissingExtraError.of("matplotlib", "plots") from error
    return pyplot


def check_path(path: Path) -> None:
    """Raise StrobeError before any measuring where the figure could not be written."""
    if path.suffix not in FORMATS:
        raise StrobeError(f"{path}: unknown figure format; supported: {', '.join(FORMATS)}")
    _pyplot()


def against_length(rows: Sequence[Row], path: Path, title: str) -> None:
    """Time, speed and extra memory against length on log axes, a line a provider."""
    pyplot = _pyplot()
    decode = all("layout" in row["case"] for row in rows)
    speed = ("gbps", "GB/s") if decode else ("tflops", "TFLOP/s")
    panels = [("ms", "ms"), speed]
    if any(row.get("peak_bytes") for row in rows):
        panels.append(("peak_bytes", "extra memory, bytes"))
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5.5 * len(panels), 4.2), layout="constrained")
    lengths = sorted({row["case"]["kv_len"] for row in rows})
    for axis, (field, label) in zip(axes, panels, strict=True):
        for provider in dict.fromkeys(row["provider"] for row in rows):
            points = [
                (row["case"]["kv_len"], row[field])
                for row in rows
                if row["provider"] == provider and row.get(field)
            ]
            if points:
                axis.plot(*zip(*sorted(points), strict=True), marker="o", markersize=4, label=provider)
        axis.set_xscale("log", base=2)
        axis.set_yscale("linear" if field == speed[0] else "log")
        axis.set_xticks(lengths, [_short(n) for n in lengths])
        axis.minorticks_off()
        axis.set_xlabel("keys")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def bars(rows: Sequence[Row], panels: Mapping[str, str], path: Path, title: str) -> None:
    """A panel a field (its name → its label), a bar a provider, with its least and most where measured."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(4 * len(panels), 4), layout="constrained", squeeze=False
    )
    for axis, (field, label) in zip(axes[0], panels.items(), strict=True):
        shown = [row for row in rows if field in row]
        values = [row[field] for row in shown]
        low = [row[field] - row.get(f"{field}_min", row[field]) for row in shown]
        high = [row.get(f"{field}_max", row[field]) - row[field] for row in shown]
        drawn = axis.bar([row["provider"] for row in shown], values, yerr=[low, high], capsize=4)
        axis.bar_label(drawn, fmt="%.4g", padding=3)
        axis.margins(y=0.12)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3, axis="y")
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def roofline(rows: Sequence[Row], matmul_tflops: float, read_gbps: float, path: Path, title: str) -> None:
    """Each row at its arithmetic intensity and rate under the measured roof (docs/math.md, equation 8).

    Rows of one intensity would print over one another, so each intensity has a column of labels
    beside its points, in the points' order.
    """
    pyplot = _pyplot()
    figure, axis = pyplot.subplots(figsize=(11, 7), layout="constrained")
    ridge = matmul_tflops * 1e3 / read_gbps
    columns = sorted({row["intensity"] for row in rows})
    low, high = min([0.5, *columns]) / 2, max([ridge, *columns]) * 12
    axis.plot([low, ridge, high], [low * read_gbps * 1e-3, matmul_tflops, matmul_tflops], "k-", linewidth=1.5)
    axis.annotate(f"{read_gbps:.4g} GB/s", (low * 1.2, low * 1.2 * read_gbps * 1.8e-3), fontsize=9)
    axis.annotate(f"{matmul_tflops:.4g} TFLOP/s", (ridge * 1.1, matmul_tflops * 1.12), fontsize=9)
    lowest = min(row["tflops"] for row in rows)
    for intensity in columns:
        column = sorted((row for row in rows if row["intensity"] == intensity), key=lambda row: row["tflops"])
        heights = _spread([row["tflops"] for row in column], 1.28)
        for row, height in zip(column, heights, strict=True):
            ours = row["provider"].startswith("strobe:")
            color = "tab:blue" if ours else "tab:orange"
            axis.plot(intensity, row["tflops"], "o" if ours else "s", color=color, markersize=6)
            axis.annotate(
                f"{row['provider'].removeprefix('strobe:')}  {row['tflops']:.3g}",
                (intensity, row["tflops"]),
                xytext=(intensity * 1.25, height),
                fontsize=8,
                va="center",
                color=color,
                arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": color},
            )
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(low, high)
    axis.set_ylim(lowest / 2, matmul_tflops * 2)
    axis.set_xlabel("operations a byte of device memory")
    axis.set_ylabel("TFLOP/s")
    axis.set_title(title)
    axis.grid(alpha=0.3, which="major")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _spread(values: Sequence[float], ratio: float) -> list[float]:
    """Ascending values moved up as little as keeps each at least `ratio` times the one before."""
    heights: list[float] = []
    for value in values:
        heights.append(max(value, heights[-1] * ratio) if heights else value)
    return heights


def _short(n: int) -> str:
    """1024 → "1k"."""
    return f"{n // 1024}k" if n % 1024 == 0 else str(n)
