"""`strobe bench latency` and `throughput`: the engine on a real model, beside transformers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from strobe.cli import console, options
from strobe.cli.load import load
from strobe.errors import StrobeError

if TYPE_CHECKING:
    from strobe.bench.results import Row

Vs = Annotated[str | None, typer.Option(help="Time this beside strobe: transformers.", show_default=False)]
Runs = Annotated[int, typer.Option(help="Times that each is measured; strobe and the peer take turns.")]


def latency(
    model: options.Model = None,
    prompt: Annotated[int, typer.Option(help="Prompt tokens.")] = 128,
    output: Annotated[int, typer.Option(help="Output tokens.")] = 128,
    runs: Runs = 5,
    vs: Vs = None,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    kernel: options.Kernel = None,
    linear: options.Linear = None,
    plot: options.Plot = None,
    save: options.Save = None,
    commit: options.Commit = None,
    json: options.Json = False,
) -> None:
    """One request at a time: time to first token, and between tokens. Answers are compared first."""
    from strobe.bench import engine, engine_peers

    _check(plot, runs)
    with load(model, device=device, dtype=dtype, kernel=kernel, linear=linear) as llm:
        peer = engine_peers.named(vs, llm) if vs else None
        rows = engine.latency(llm, peer, prompt=prompt, output=output, runs=runs)
    title = f"{rows[0]['case']['model']}, prompt {prompt}, output {output}, {rows[0]['case']['dtype']}"
    columns = {
        "ttft_ms": "first token, ms",
        "tpot_ms": "between tokens, ms",
        "tpot_ms_p50": "p50",
        "tpot_ms_p99": "p99",
        "tok_s": "tok/s",
    }
    _report("latency", rows, title, columns, plot=plot, save=save, commit=commit, json=json)


def throughput(
    model: options.Model = None,
    requests: Annotated[int, typer.Option(help="Requests, all sent at once.")] = 32,
    prompt: Annotated[tuple[int, int], typer.Option(help="Shortest and longest prompt, tokens.")] = (16, 256),
    output: Annotated[tuple[int, int], typer.Option(help="Shortest and longest output, tokens.")] = (16, 256),
    runs: Runs = 3,
    vs: Vs = None,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    kernel: options.Kernel = None,
    linear: options.Linear = None,
    plot: options.Plot = None,
    save: options.Save = None,
    commit: options.Commit = None,
    json: options.Json = False,
) -> None:
    """Many requests of mixed lengths: output tokens a second. The peer gets its best batch size."""
    from strobe.bench import engine, engine_peers

    _check(plot, runs)
    work = engine.Load(requests, prompt, output)
    with load(model, device=device, dtype=dtype, kernel=kernel, linear=linear) as llm:
        peer = engine_peers.named(vs, llm) if vs else None
        rows = engine.throughput(llm, peer, work, runs=runs)
    lengths = f"prompts {prompt[0]} to {prompt[1]}, outputs {output[0]} to {output[1]}"
    title = f"{rows[0]['case']['model']}, {requests} requests, {lengths}, {rows[0]['case']['dtype']}"
    columns = {"tok_s": "tok/s", "s": "seconds", "s_min": "least", "s_max": "most", "best_batch": "batch"}
    _report("throughput", rows, title, columns, plot=plot, save=save, commit=commit, json=json)


def _check(plot: Path | None, runs: int) -> None:
    from strobe.bench import plots

    if plot is not None:
        plots.check_path(plot)
    if not 1 <= runs <= 1000:
        raise StrobeError(f"runs is {runs}; supported: 1 to 1000")


def _report(
    bench: str,
    rows: list[Row],
    title: str,
    columns: dict[str, str],
    *,
    plot: Path | None,
    save: Path | None,
    commit: str | None,
    json: bool,
) -> None:
    """Write what was asked for: the result file, the figure, and JSON or a table on stdout."""
    from strobe.bench import plots
    from strobe.bench.results import Result, default_path

    result = Result.here(bench, rows, commit=commit)
    if save is not None:
        result.save(default_path(bench) if str(save) == "auto" else save)
    if plot is not None:
        panels = {"latency": ["ttft_ms", "tpot_ms"], "throughput": ["tok_s"]}[bench]
        plots.bars(rows, {field: columns[field] for field in panels}, plot, title)
    if json:
        console.write_json(result.__dict__)
        return
    console.write(f"{title}\n\n")
    shown = {field: name for field, name in columns.items() if any(field in row for row in rows)}
    table = [[row["provider"], *(_cell(row, field) for field in shown)] for row in rows]
    console.write_table(["", *shown.values()], table)
    if len(rows) == 2:
        console.write(f"\nsame tokens: {'yes' if rows[0]['checked'] else 'NO'}; ")
        console.write(f"strobe: {rows[0]['tok_s'] / rows[1]['tok_s']:.2f} times the tok/s\n")


def _cell(row: dict[str, Any], field: str) -> str:
    return f"{row[field]:.4g}" if field in row else "–"
