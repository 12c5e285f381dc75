"""Keeps the tables of README.md and docs/, and the figures they show, equal to the committed results.

A table stands between `<!-- results: NAME -->` and `<!-- end -->`; NAME is `machine/table`, as in
`h200/prefill`. A figure stands beside its result. `python -m strobe.bench.document` makes them all anew,
`--check` says which are stale.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

from strobe.attention import ladder
from strobe.bench import plots, tables
from strobe.bench.results import Result, Row
from strobe.errors import StrobeError, UnknownNameError

RESULTS = Path("benchmarks/results")
_BLOCK = re.compile(r"(<!-- results: (?P<name>[\w/-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def documents(root: Path) -> list[Path]:
    """The files that may hold tables."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def render(text: str, root: Path) -> str:
    """The document with every table made anew. Raises StrobeError where a result file is missing."""

    def fresh(block: re.Match[str]) -> str:
        machine, _, name = block["name"].partition("/")
        if name not in TABLES:
            raise UnknownNameError.among("table", name, TABLES)
        bench, make = TABLES[name]
        path = root / RESULTS / machine / f"{bench}.json"
        if not path.is_file():
            raise StrobeError(f"table {block['name']} needs {path}, which is not there")
        result = Result.load(path)
        return f"{block[1]}\n{make(result)}\n{_origin(result)}\n\n{block[3]}"

    return _BLOCK.sub(fresh, text)


def _origin(result: Result) -> str:
    device = result.machine.get("gpu") or result.machine.get("cpu", "")
    torch = result.versions.get("torch", "")
    return f"*{device}, torch {torch}, strobe {result.commit}, {result.when[:10]}.*"


def _prefill(result: Result) -> str:
    return (
        "TFLOP/s, forward, "
        + _dtype(result)
        + ":\n\n"
        + tables.by_provider(_peered(result.rows), tables.speed("tflops"), best="tflops")
    )


def _decode(result: Result) -> str:
    return _microseconds(result, _peered(result.rows))


def _decode_ladder(result: Result) -> str:
    order = [f"strobe:{rung.name}" for rung in ladder.DECODE]
    ours = [row for row in result.rows if row["provider"] in order]
    return _microseconds(result, sorted(ours, key=lambda row: order.index(row["provider"])))


def _microseconds(result: Result, rows: list[Row]) -> str:
    def cell(row: Row) -> str:
        return f"{row['ms'] * 1e3:.4g}" if row["checked"] else "WRONG"

    fastest = [{**row, "speed": 1 / row["ms"]} if "ms" in row else row for row in rows]
    table = tables.by_provider(fastest, cell, best="speed")
    return f"Microseconds a call, {_dtype(result)}:\n\n{table}"


def _ladder(result: Result) -> str:
    roof = result.machine["ceilings"]["matmul_tflops"]
    parts = []
    for case in _first_cases(result.rows, 2):
        rows = {row["provider"]: row for row in result.rows if tables.case_name(row["case"]) == case}
        lines, before = [], None
        for rung in ladder.PREFILL:
            row = rows.get(f"strobe:{rung.name}")
            if row is None or "ms" not in row:
                continue
            over = "" if before is None else f"{before / row['ms']:.2f}"
            share = f"{row['tflops'] / roof:.1%}"
            cells = [f"{row['ms']:.4g}", f"{row['tflops']:.4g}", share, tables.memory(row), over]
            lines.append([f"`{rung.name}`", rung.idea, *cells])
            before = row["ms"]
        head = ["rung", "idea", "ms", "TFLOP/s", "of the matmul ceiling", "extra MiB", "times the one before"]
        parts.append(f"{case[0].upper()}{case[1:]}, {_dtype(result)}:\n\n{tables.markdown(head, lines)}")
    return "\n".join(parts)


def _standard(result: Result) -> str:
    time = tables.by_provider(result.rows, tables.speed("ms"))
    memory = tables.by_provider(result.rows, tables.memory)
    return f"Milliseconds, {_dtype(result)}:\n\n{time}\nExtra memory, MiB:\n\n{memory}"


def _memory(result: Result) -> str:
    return "MiB beyond inputs and output:\n\n" + tables.by_provider(result.rows, tables.memory)


def _linear(result: Result) -> str:
    ceilings = result.machine["ceilings"]
    lines = []
    for row in (row for row in result.rows if "tokens" in row["case"]):
        case, name = row["case"], f"`{row['provider'].removeprefix('strobe:')}`"
        shape = f"{case['tokens']} x {case['inputs']} → {case['outputs']}"
        if "ms" not in row:
            lines.append([shape, name, "WRONG", "", "", ""])
            continue
        roof = min(ceilings["matmul_tflops"], ceilings["read_gbps"] * row["intensity"] * 1e-3)
        figures = (f"{row[field]:.4g}" for field in ("ms", "tflops", "gbps"))
        lines.append([shape, name, *figures, f"{row['tflops'] / roof:.1%}"])
    head = ["tokens x inputs → outputs", "rung", "ms", "TFLOP/s", "GB/s", "of the roof"]
    return f"{ceilings['dtype']}:\n\n{tables.markdown(head, lines)}"


def _latency(result: Result) -> str:
    def line(row: Row) -> list[str]:
        figures = (
            f"{row[name]:.4g}" for name in ("ttft_ms", "tpot_ms", "tpot_ms_p50", "tpot_ms_p99", "tok_s")
        )
        return [row["case"]["model"], row["provider"], *figures]

    case = result.rows[0]["case"]
    head = ["model", "", "first token, ms", "between tokens, ms", "p50", "p99", "tok/s"]
    about = f"One request, prompt {case['prompt']}, output {case['output']}, {_dtype(result)}"
    return f"{about}:\n\n{tables.markdown(head, [line(row) for row in result.rows])}"


def _throughput(result: Result) -> str:
    case = result.rows[0]["case"]
    (p_low, p_high), (o_low, o_high) = case["prompt"], case["output"]
    about = f"{case['requests']} requests, prompts {p_low} to {p_high}, outputs {o_low} to {o_high}"
    lines = [
        [row["case"]["model"], row["provider"], f"{row['tok_s']:.4g}", str(row.get("best_batch", "–"))]
        for row in result.rows
    ]
    head = ["model", "", "output tok/s", "best batch size"]
    return f"{about}, {_dtype(result)}:\n\n{tables.markdown(head, lines)}"


def _engine_ladder(result: Result) -> str:
    lines, before = [], None
    for row in result.rows:
        name = row["provider"].removeprefix("strobe:")
        kernels = [f"`{kernel}`" for kernel in (row["attention_kernel"], row["linear_kernel"])]
        if "tok_s" not in row:
            lines.append([name, *kernels, "–", "–", "refused" if "refused" in row else "WRONG", ""])
            continue
        over = "" if before is None else f"{row['tok_s'] / before:.2f}"
        figures = [f"{row[field]:.4g}" for field in ("ttft_ms", "tok_s", "gbps")]
        lines.append([name, *kernels, *figures, over])
        before = row["tok_s"]
    case = result.rows[0]["case"]
    named = case["model"] + (f" ({case['weights']} weights)" if "weights" in case else "")
    about = f"{named}, one request, prompt {case['prompt']}, output {case['output']}, {case['dtype']}"
    head = [
        "engine",
        "attention",
        "matmul",
        "first token, ms",
        "tok/s",
        "GB/s",
        "times the one before",
    ]
    return f"{about}:\n\n{tables.markdown(head, lines)}"


def _dtype(result: Result) -> str:
    return ", ".join(sorted({row["case"]["dtype"] for row in result.rows}))


def _first_cases(rows: list[Row], count: int) -> list[str]:
    return list(dict.fromkeys(tables.case_name(row["case"]) for row in rows))[:count]


def _peered(rows: list[Row]) -> list[Row]:
    """Peers, and strobe's kernels that are measured against them: the production rungs."""
    production = ("cuda_hopper", "cuda_async", "triton_fused", "cuda_paged")
    return [
        row
        for row in rows
        if not row["provider"].startswith("strobe:") or row["provider"].removeprefix("strobe:") in production
    ]


TABLES: dict[str, tuple[str, Callable[[Result], str]]] = {
    "prefill": ("prefill", _prefill),
    "decode": ("decode", _decode),
    "decode_ladder": ("decode", _decode_ladder),
    "ladder": ("ladder", _ladder),
    "standard": ("ladder", _standard),
    "memory": ("memory", _memory),
    "linear": ("roofline", _linear),
    "latency": ("latency", _latency),
    "throughput": ("throughput", _throughput),
    "engine_ladder": ("engine_ladder", _engine_ladder),
}
"""By name: the result file, and what is made of it."""


def stale_figures(root: Path) -> list[tuple[Result, Path]]:
    """The figures that are not there or were not drawn from the result beside them, which they name."""
    return [
        (result, figure)
        for path in sorted((root / RESULTS).glob("*/roofline.json"))
        for result in [Result.load(path)]
        for figure in (path.with_suffix(".png"), path.with_suffix(".svg"))
        if not figure.is_file() or plots.roofline_title(result).encode() not in figure.read_bytes()
    ]


def main(arguments: list[str]) -> int:
    """Make the tables and figures below the current folder; with `--check` name the stale ones, return 1."""
    root, stale = Path.cwd(), []
    for result, figure in stale_figures(root):
        stale.append(figure.relative_to(root))
        if "--check" not in arguments:
            plots.roofline(result, figure)
    for path in documents(root):
        text = path.read_text(encoding="utf-8")
        fresh = render(text, root)
        if fresh == text:
            continue
        stale.append(path.relative_to(root))
        if "--check" not in arguments:
            path.write_text(fresh, encoding="utf-8")
    for path in stale:
        sys.stderr.write(f"{path}: {'stale: make results' if '--check' in arguments else 'made'}\n")
    return 1 if stale and "--check" in arguments else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except StrobeError as error:
        sys.exit(f"error: {error}")
