"""Figures made from result rows: lines against length, bars, and the roofline. Needs the extra `plots`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from strobe.bench.results import Result, Row
from strobe.errors import MissingExtraError, StrobeError

FORMATS = (".png", ".svg", ".pdf")


def load_pyplot() -> Any:
    """matplotlib, drawing to files. Raises MissingExtraError."""
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
    if not path.parent.is_dir():
        raise StrobeError(f"{path}: no such folder")
    load_pyplot()


def against_length(rows: Sequence[Row], path: Path, title: str) -> None:
    """Time, speed and extra memory against length on log axes, a line a provider; peers are dashed."""
    pyplot = load_pyplot()
    decode = all("layout" in row["case"] for row in rows)
    speed = ("gbps", "GB/s") if decode else ("tflops", "TFLOP/s")
    panels = [("ms", "ms"), speed]
    if any(row.get("peak_bytes") for row in rows):
        panels.append(("peak_bytes", "extra memory, MiB"))
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5 * len(panels) + 2, 4.5), layout="constrained")
    lengths = sorted({row["case"]["kv_len"] for row in rows})
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    colors = pyplot.get_cmap("tab10" if len(providers) <= 10 else "tab20").colors
    for axis, (field, label) in zip(axes, panels, strict=True):
        for index, provider in enumerate(providers):
            unit = 2**20 if field == "peak_bytes" else 1
            points = [
                (row["case"]["kv_len"], row[field] / unit)
                for row in rows
                if row["provider"] == provider and row.get(field) is not None
            ]
            if points:
                line(axis, points, provider, colors[index % len(colors)])
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [short(n) for n in lengths])
        if field == "ms":
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(pyplot.matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        elif field == "peak_bytes":  # none is an amount too
            axis.set_yscale("symlog", linthresh=0.001)
            axis.set_ylim(-0.0005, 2 * max(row.get(field) or 0 for row in rows) / 2**20)
        if field != speed[0]:
            axis.yaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
        axis.set_xlabel("keys")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.suptitle(title)
    write(figure, path, title)


def line(axis: Any, points: Sequence[tuple[float, float]], provider: str, color: Any) -> None:
    """A provider's points, none too: ours on a solid line, a peer's on a dashed one."""
    ours = provider.startswith("strobe:")
    ordered = sorted(points)
    axis.plot(
        [x for x, _ in ordered],
        [y for _, y in ordered],
        color=color,
        linestyle="-" if ours else "--",
        marker="o" if ours else "s",
        markersize=4,
        label=provider.removeprefix("strobe:"),
    )


def bars(rows: Sequence[Row], panels: Mapping[str, str], path: Path, title: str) -> None:
    """A panel a field (its name → its label), a bar a provider, with its least and most where measured."""
    pyplot = load_pyplot()
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
    write(figure, path, title)


_KINDS = {
    "attention": ("tab:blue", "o"),
    "matrix product": ("tab:green", "^"),
    "peer": ("tab:orange", "s"),
}


def title_of(result: Result) -> str:
    """Names the result that a figure is drawn from."""
    machine = result.machine.get("gpu") or result.machine["cpu"]
    dtype = result.machine["ceilings"]["dtype"]
    return f"{machine}, {dtype}; strobe {result.commits}, {result.when[:10]}"


def roofline(result: Result, path: Path) -> None:
    """Each row at its arithmetic intensity and rate under the measured roof (docs/math.md, equation 8).

    Rows of one intensity would print over one another, so each intensity has a column of labels
    beside its points, in the points' order and under the roof: on the right, or on the left where the
    next intensity is near. Of a kernel's several rows in a column the first is drawn.
    """
    pyplot = load_pyplot()
    figure, axis = pyplot.subplots(figsize=(15, 9), layout="constrained")
    rows = [row for row in result.rows if row["checked"]]
    matmul_tflops, read_gbps = (result.machine["ceilings"][name] for name in ("matmul_tflops", "read_gbps"))
    ridge = matmul_tflops * 1e3 / read_gbps
    columns = _columns(rows)
    low, high = min([ridge, *columns]) / 2, max([ridge, *columns]) * 6
    axis.plot([low, ridge, high], [low * read_gbps * 1e-3, matmul_tflops, matmul_tflops], "k-", linewidth=1.5)
    axis.annotate(f"{read_gbps:.4g} GB/s", (low * 1.2, low * 1.2 * read_gbps * 1.8e-3), fontsize=9)
    axis.annotate(f"{matmul_tflops:.4g} TFLOP/s", (ridge * 1.1, matmul_tflops * 1.12), fontsize=9)
    bottom, top = min(row["tflops"] for row in rows) / 2, matmul_tflops * 2
    gap = math.log(top / bottom) / 58  # labels of 7.5 points on axes 8 inches high
    for intensity, after in zip(columns, [*list(columns)[1:], math.inf], strict=True):
        column = columns[intensity]
        to_left = after < 3 * intensity
        roof = min(matmul_tflops, read_gbps * intensity * (0.5 if to_left else 1.2) * 1e-3)
        places = _spread([math.log(row["tflops"]) for row in column], gap, math.log(roof) - 0.7 * gap)
        for row, place in zip(column, places, strict=True):
            color, marker = _KINDS[_kind(row)]
            axis.plot(intensity, row["tflops"], marker, color=color, markersize=5)
            axis.annotate(
                f"{row['provider'].removeprefix('strobe:')}  {row['tflops']:.3g}",
                (intensity, row["tflops"]),
                xytext=(intensity / 1.2 if to_left else intensity * 1.2, math.exp(place)),
                fontsize=7.5,
                ha="right" if to_left else "left",
                va="center",
                color=color,
                arrowprops={
                    "arrowstyle": "-",
                    "linewidth": 0.4,
                    "color": color,
                    "shrinkA": 1,
                    "relpos": (1.0 if to_left else 0.0, 0.5),
                },
            )
    for kind in dict.fromkeys(map(_kind, rows)):
        color, marker = _KINDS[kind]
        axis.plot([], [], marker, color=color, label=kind)
    axis.legend(loc="upper left", fontsize=9)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(low, high)
    axis.set_ylim(bottom, top)
    axis.set_xlabel("operations a byte of device memory")
    axis.set_ylabel("TFLOP/s")
    axis.set_title(title := title_of(result))
    axis.grid(alpha=0.3, which="major")
    write(figure, path, title)


def write(figure: Any, path: Path, title: str) -> None:
    """Save and close a figure; drawn again from the same result, an SVG is the same file."""
    pyplot = load_pyplot()
    metadata = {"Title": title, **({"Date": None} if path.suffix == ".svg" else {})}
    with pyplot.rc_context({"svg.hashsalt": "strobe"}):
        figure.savefig(path, dpi=130, metadata=metadata)
    pyplot.close(figure)


def _columns(rows: Sequence[Row]) -> dict[float, list[Row]]:
    """Intensity, ascending → its rows, slowest first, one a kernel; intensities within 5 % are one."""
    columns: dict[float, dict[str, Row]] = {}
    for row in rows:
        near = (known for known in columns if abs(math.log(row["intensity"] / known)) < 0.05)
        columns.setdefault(next(near, row["intensity"]), {}).setdefault(row["provider"], row)
    return {
        intensity: sorted(columns[intensity].values(), key=lambda row: row["tflops"])
        for intensity in sorted(columns)
    }


def _kind(row: Row) -> str:
    if not row["provider"].startswith("strobe:"):
        return "peer"
    return "matrix product" if "tokens" in row["case"] else "attention"


def _spread(values: Sequence[float], gap: float, most: float) -> list[float]:
    """Ascending values moved as little as keeps each `gap` above the one before, and all below `most`.

    With i gaps taken off the i-th, that is a regression to an ascending sequence: neighbours out of
    order share their mean.
    """
    pools: list[tuple[float, int]] = []  # mean and count
    for index, value in enumerate(values):
        pool = (value - index * gap, 1)
        while pools and pools[-1][0] > pool[0]:
            mean, count = pools.pop()
            pool = ((mean * count + pool[0] * pool[1]) / (count + pool[1]), count + pool[1])
        pools.append(pool)
    level = [mean for mean, count in pools for _ in range(count)]
    highest = most - (len(values) - 1) * gap
    return [min(mean, highest) + index * gap for index, mean in enumerate(level)]


def short(n: int) -> str:
    """1024 → "1k"."""
    return f"{n // 1024}k" if n % 1024 == 0 else str(n)
