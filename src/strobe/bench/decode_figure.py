"""Decode's share of the read ceiling against the context, a panel for each batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from strobe.bench import plots
from strobe.bench.results import Result, Row

BATCHES = (1, 8, 64)
"""The panels of the committed figure, where there are such rows."""


def against_context(result: Result, path: Path) -> None:
    """A line a provider over the contexts of the commonest heads; peers are dashed."""
    pyplot = plots.load_pyplot()
    rows = _shown(result)
    batches = sorted({row["case"]["batch"] for row in rows})
    chosen = [batch for batch in batches if batch in BATCHES] or batches
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    colors = pyplot.get_cmap("tab10" if len(providers) <= 10 else "tab20").colors
    roof = result.machine["ceilings"]["read_gbps"]
    figure, axes = pyplot.subplots(
        1, max(len(chosen), 1), figsize=(4.4 * max(len(chosen), 1) + 1.6, 4), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis, batch in zip(axes[0], chosen, strict=False):
        here = [row for row in rows if row["case"]["batch"] == batch]
        lengths = sorted({row["case"]["kv_len"] for row in here})
        for index, provider in enumerate(providers):
            points = [
                (row["case"]["kv_len"], 100 * row["gbps"] / roof)
                for row in here
                if row["provider"] == provider
            ]
            plots.line(axis, points, provider, colors[index % len(colors)])
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [plots.short(n) for n in lengths])
        axis.minorticks_off()
        axis.set_ylim(0, 105)
        axis.set_title(f"batch {batch}", fontsize=10)
        axis.set_xlabel("context, tokens a row")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel(f"% of the read ceiling, {roof:.4g} GB/s")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.suptitle(title := plots.title_of(result), fontsize=10)
    plots.write(figure, path, title)


def drawable(result: Result) -> bool:
    """Whether some batch has contexts to draw a line over."""
    points = {(row["case"]["batch"], row["case"]["kv_len"]) for row in _shown(result)}
    batches = [batch for batch, _ in points]
    return any(batches.count(batch) > 2 for batch in batches)


def _shown(result: Result) -> list[Row]:
    """Plain rows: one token each, equal lengths, a cache in q's dtype, the heads that most rows have."""
    rows = [
        row
        for row in result.rows
        if row["checked"] and "layout" in row["case"] and row["case"]["q_len"] == 1 and "gbps" in row
        if not {"kv_len_min", "kv_dtype", "window"} & set(row["case"])
    ]
    heads = [_heads(row) for row in rows]
    return [row for row in rows if _heads(row) == max(set(heads), key=heads.count)]


def _heads(row: Row) -> tuple[Any, ...]:
    return tuple(row["case"][name] for name in ("q_heads", "kv_heads", "head_dim", "page_size"))
