"""Markdown tables made from result rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from strobe.bench.results import Row


def case_name(case: dict[str, Any], *, lengths: bool = True) -> str:
    """One line for a shape: "batch 4, 2048, heads 32/8 x 128, causal"; without its lengths for a sweep."""
    heads = str(case["q_heads"])
    if "op" in case:
        inputs = {"l2": "L2"}.get(case.get("inputs", ""), "memory")
        heads = f"heads {heads}/{case['kv_heads']} x {case['head_dim']}"
        return f"{case['tokens']} tokens, {heads}, page {case['page_size']}, inputs in {inputs}"
    if case["kv_heads"] != case["q_heads"]:
        heads += f"/{case['kv_heads']}"
    parts = [f"batch {case['batch']}"]
    if lengths:
        alike = case["q_len"] == case["kv_len"]
        keys = str(case["kv_len"])
        if "kv_len_min" in case:
            keys = f"{case['kv_len_min']} to {keys}"
        parts.append(keys if alike else f"{case['q_len']} x {keys}")
    parts += [f"heads {heads} x {case['head_dim']}", "causal" if case["causal"] else "full"]
    if "page_size" in case:
        parts[-1] = f"page {case['page_size']}"
    if "kv_dtype" in case:
        parts.append(f"cache in {case['kv_dtype'].partition('_')[0]}")
    return ", ".join(parts)


def by_provider(rows: Sequence[Row], cell: Callable[[Row], str], *, best: str | None = None) -> str:
    """Cases down, providers across. `best` names the field whose largest value is set in bold."""
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    cases = list(dict.fromkeys(case_name(row["case"]) for row in rows))
    found = {(case_name(row["case"]), row["provider"]): row for row in rows}
    lines = []
    for case in cases:
        here = [found.get((case, provider)) for provider in providers]
        most = max((row[best] for row in here if row and best in row), default=None) if best else None
        cells = []
        for row in here:
            text = "–" if row is None else cell(row)
            cells.append(f"**{text}**" if row and best and row.get(best) == most else text)
        lines.append([case, *cells])
    return markdown(["", *(name.removeprefix("strobe:") for name in providers)], lines)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table, its columns aligned in the source too."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(head), line(["-" * width for width in widths]), *map(line, rows)]) + "\n"


def number(figure: float) -> str:
    """Four digits, or all of them before the point: 0.7378, 23.05, 51,960."""
    return f"{figure:,.0f}" if abs(figure) >= 1e4 else f"{figure:.4g}"


def speed(field: str) -> Callable[[Row], str]:
    """A cell that shows a figure, or that the answer was wrong."""
    return lambda row: number(row[field]) if row["checked"] else "WRONG"


def memory(row: Row) -> str:
    """A cell of extra memory in MiB; "≤" where only a bound was measured."""
    if row["peak_bytes"] is not None:
        return number(row["peak_bytes"] / 2**20)
    bound = row.get("peak_bytes_at_most")
    return "–" if bound is None else f"≤ {number(bound / 2**20)}"
