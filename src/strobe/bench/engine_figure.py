"""The engines' share of the floor, a panel for each model, a group of bars for each case."""

from __future__ import annotations

from pathlib import Path

from strobe.bench import plots
from strobe.bench.results import Result, Row


def against_floor(result: Result, path: Path) -> None:
    """What each engine reaches of what the machine could, with its tok/s on the bar."""
    pyplot = plots.load_pyplot()
    rows = _shown(result)
    models = list(dict.fromkeys(row["case"]["model"] for row in rows))
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    colors = pyplot.get_cmap("tab10").colors
    figure, axes = pyplot.subplots(
        len(models), 1, figsize=(9, 2.6 * len(models) + 0.8), squeeze=False, layout="constrained"
    )
    for axis, model in zip(axes[:, 0], models, strict=True):
        here = [row for row in rows if row["case"]["model"] == model]
        cases = list(dict.fromkeys(map(_case, here)))
        present = [provider for provider in providers if any(row["provider"] == provider for row in here)]
        width = 0.8 / len(present)
        for index, provider in enumerate(present):
            mine = [row for row in here if row["provider"] == provider]
            places = [cases.index(_case(row)) + (index - (len(present) - 1) / 2) * width for row in mine]
            shares = [row["floor_percent"] for row in mine]
            color = colors[providers.index(provider)]
            drawn = axis.bar(places, shares, 0.92 * width, color=color, label=provider)
            axis.bar_label(drawn, [f"{row['tok_s']:,.0f}" for row in mine], padding=2, fontsize=7)
        axis.set_xticks(range(len(cases)), cases, fontsize=8)
        axis.set_ylim(0, 112)
        axis.set_ylabel("% of the floor")
        axis.set_title(model, fontsize=10, loc="left")
        axis.grid(alpha=0.3, axis="y")
    handles = {}
    for axis in axes[:, 0]:
        handles.update(
            {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
        )
    figure.legend(
        list(handles.values()),
        list(handles),
        title="on the bars: output tokens a second",
        title_fontsize=8,
        loc="outside lower center",
        ncols=len(handles),
        fontsize=8,
    )
    figure.suptitle(title := plots.title_of(result), fontsize=9)
    plots.write(figure, path, title)


def drawable(result: Result) -> bool:
    return bool(_shown(result))


def _shown(result: Result) -> list[Row]:
    return [row for row in result.rows if "floor_percent" in row and "tok_s" in row]


def _case(row: Row) -> str:
    case = row["case"]
    if "requests" in case:
        return f"{case['requests']} requests"
    return f"batch {case['batch']}\nprompt {case['prompt']}"
