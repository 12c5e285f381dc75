"""The figure of `strobe bench serve`: latency and throughput against the rate of arrivals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from strobe.bench.plots import load_pyplot, write
from strobe.bench.results import Row

_PANELS = {
    "ttft_ms": "time to first token, ms",
    "tpot_ms": "time per output token, ms",
    "e2e_ms": "whole, ms",
}


def against_rate(rows: Sequence[Row], path: Path, title: str) -> None:
    """A panel a latency with its p50 and p99, and one for what was asked for and what came."""
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(1, len(_PANELS) + 1, figsize=(15, 3.8), layout="constrained")
    labels = [f"{float(row['case']['rate']):g}" for row in rows]
    places = range(len(rows))
    for axis, (name, label) in zip(axes, _PANELS.items(), strict=False):
        for percentile, style in ((50, "-o"), (99, "--s")):
            points = [(i, row[f"{name}_p{percentile}"]) for i, row in enumerate(rows) if name in row]
            if points:
                axis.plot(*zip(*points, strict=True), style, markersize=4, label=f"p{percentile}")
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=8)
    throughput = axes[-1]
    throughput.plot(places, [row["req_s"] for row in rows], "-o", markersize=4, label="answered")
    if all("goodput_req_s" in row for row in rows):
        throughput.plot(places, [row["goodput_req_s"] for row in rows], "--s", markersize=4, label="goodput")
    throughput.set_ylabel("requests/s")
    throughput.set_ylim(bottom=0)
    throughput.legend(fontsize=8)
    for axis in axes:
        axis.set_xticks(places, labels)
        axis.set_xlabel("arrivals, requests/s")
        axis.grid(alpha=0.3)
    figure.suptitle(title, fontsize=10)
    write(figure, path, title)
