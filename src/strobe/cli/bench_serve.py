"""`strobe bench serve`: an OpenAI server under open-loop load."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import typer

from strobe.cli import console, options
from strobe.errors import StrobeError, UnknownNameError

if TYPE_CHECKING:
    from strobe.bench.results import Row


def serve(
    url: Annotated[str, typer.Option("--url", "--base-url", help="The server.")] = "http://127.0.0.1:8000",
    rate: Annotated[
        list[str] | None,
        typer.Option(
            "--rate",
            "--request-rate",
            help="Arrivals a second, inf for all at once; several are measured in turn.",
            show_default="1 4 16",
        ),
    ] = None,
    requests: Annotated[int, typer.Option("--requests", "--num-prompts", help="Requests a rate.")] = 100,
    prompt: Annotated[tuple[int, int], typer.Option(help="Shortest and longest prompt, tokens.")] = (16, 128),
    output: Annotated[tuple[int, int], typer.Option(help="Shortest and longest output, tokens.")] = (16, 128),
    goodput: Annotated[
        list[str] | None,
        typer.Option(
            help="What a good answer keeps to, in ms: ttft:200, tpot:50, e2e:5000.", show_default=False
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Its name there.", show_default="the first one listed")
    ] = None,
    api_key: Annotated[str | None, typer.Option(help="A key to bring.", show_default=False)] = None,
    vocab: Annotated[int, typer.Option(help="Prompts are random token ids below this.")] = 1000,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos/--no-ignore-eos", help="Ask for outputs of the full length.")
    ] = True,
    seed: Annotated[int, typer.Option(help="Draws arrivals, prompts and lengths.")] = 0,
    provider: Annotated[str, typer.Option(help="What the rows call the server.")] = "strobe",
    plot: options.Plot = None,
    save: options.Save = None,
    commit: options.Commit = None,
    json: options.Json = False,
) -> None:
    """Load any OpenAI server with requests that come at random times, and take the percentiles.

    Latencies count from when a request was due. Prompts are token ids to /v1/completions, streamed.
    """
    from strobe.bench import plots, serve_figure
    from strobe.bench import serve as bench
    from strobe.bench.results import Result, default_path

    if plot is not None:
        plots.check_path(plot)
    loads = [
        bench.Workload(each, requests, prompt, output, vocab, seed)
        for each in map(_rate, rate or ["1", "4", "16"])
    ]
    target = bench.Target(url, model, api_key, ignore_eos)
    bar, task = console.progress(requests * len(loads), "requests")
    with bar:
        rows = bench.measure(
            target,
            loads,
            provider=provider,
            objectives=dict(_objective(text) for text in goodput or ()),
            on_answer=lambda: bar.advance(task),
        )
    result = Result.here("serve", rows, commit=commit)
    if save is not None:
        result.save(default_path("serve") if str(save) == "auto" else save)
    title = (
        f"{rows[0]['case']['model']} on {provider}, prompts {prompt[0]} to {prompt[1]}, "
        f"outputs {output[0]} to {output[1]}, {requests} requests a rate"
    )
    if plot is not None:
        serve_figure.against_rate(rows, plot, title)
    if json:
        console.write_json(result.__dict__)
        return
    console.write(f"{title}\n\n")
    console.write_table(
        ["rate", "ok", "429", "failed", "req/s", "good/s", "tok/s", *_latency_names()],
        [_line(row) for row in rows],
    )


def _rate(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise StrobeError(f"rate is {text!r}; supported: a number over 0, or inf") from None


def _objective(text: str) -> tuple[str, float]:
    """ "ttft:200" → ("ttft", 0.2)."""
    from strobe.bench.serve import OBJECTIVES

    name, _, limit = text.partition(":")
    if name not in OBJECTIVES:
        raise UnknownNameError.among("objective", name, OBJECTIVES)
    try:
        milliseconds = float(limit)
    except ValueError:
        milliseconds = math.nan
    if not milliseconds > 0:
        raise StrobeError(f"--goodput {text}: no limit in ms", hint=f"--goodput {name}:200")
    return name, milliseconds / 1e3


_SHOWN = [("ttft", 50), ("ttft", 99), ("tpot", 50), ("tpot", 99), ("e2e", 50), ("e2e", 99)]


def _latency_names() -> list[str]:
    return [f"{name} p{percentile}, ms" for name, percentile in _SHOWN]


def _line(row: Row) -> list[str]:
    counts = [
        f"{float(row['case']['rate']):g}",
        *(str(row[name]) for name in ("completed", "refused", "failed")),
    ]
    values = [row.get(name) for name in ("req_s", "goodput_req_s", "tok_s")]
    values += [row.get(f"{name}_ms_p{percentile}") for name, percentile in _SHOWN]
    return counts + ["–" if value is None else f"{value:.4g}" for value in values]
