"""`strobe bench latency` and `throughput`: the engine on a model or on random weights, beside others."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from strobe import device as devices
from strobe import settings
from strobe.cli import bench_options, console, options

if TYPE_CHECKING:
    from strobe.bench.engine_cases import Case, Network
    from strobe.bench.results import Row
    from strobe.bench.subject import Subject
    from strobe.models.network import Model

PEERS = ("transformers", "vllm", "vllm-in-process")
Vs = Annotated[
    str | None,
    typer.Option(
        help="Time these beside strobe: transformers, vllm, vllm-in-process (random weights).",
        show_default=False,
    ),
]


def latency(
    model: options.Model = None,
    random: bench_options.Random = None,
    prompt: bench_options.Prompt = 128,
    output: bench_options.Output = 128,
    runs: bench_options.Runs = 5,
    vs: Vs = None,
    engine: bench_options.EngineOptions = None,
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
    from strobe.bench import engine as bench
    from strobe.bench import engine_peers
    from strobe.bench.engine_cases import Batch

    case = Batch(1, prompt, output)
    peers = check(plot, runs, vs, random)
    subject = _subject(model, random, engine, device=device, dtype=dtype, kernel=kernel, linear=linear)
    peer = engine_peers.named("transformers", subject) if "transformers" in peers else None
    rows = bench.latency(subject, peer, prompt=prompt, output=output, runs=runs)
    network = network_of(subject.model)
    del subject, peer
    rows += vllm_rows(random, peers, case, runs, network)
    title = f"{rows[0]['case']['model']}, prompt {prompt}, output {output}, {rows[0]['case']['dtype']}"
    columns = {
        "ttft_ms": "first token, ms",
        "tpot_ms": "between tokens, ms",
        "tpot_ms_p50": "p50",
        "tpot_ms_p99": "p99",
        "tok_s": "tok/s",
        "gbps": "GB/s",
        "floor_percent": "% of the floor",
    }
    _report("latency", rows, title, columns, plot=plot, save=save, commit=commit, json=json)


def throughput(
    model: options.Model = None,
    random: bench_options.Random = None,
    requests: Annotated[int, typer.Option(help="Requests, all sent at once.")] = 32,
    prompt: Annotated[tuple[int, int], typer.Option(help="Shortest and longest prompt, tokens.")] = (16, 256),
    output: Annotated[tuple[int, int], typer.Option(help="Shortest and longest output, tokens.")] = (16, 256),
    runs: bench_options.Runs = 3,
    vs: Vs = None,
    engine: bench_options.EngineOptions = None,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    kernel: options.Kernel = None,
    linear: options.Linear = None,
    plot: options.Plot = None,
    save: options.Save = None,
    commit: options.Commit = None,
    json: options.Json = False,
) -> None:
    """Many requests of mixed lengths: output tokens a second. transformers gets its best batch size."""
    from strobe.bench import engine as bench
    from strobe.bench import engine_peers
    from strobe.bench.engine_cases import Load

    work = Load(requests, prompt, output)
    peers = check(plot, runs, vs, random)
    subject = _subject(model, random, engine, device=device, dtype=dtype, kernel=kernel, linear=linear)
    peer = engine_peers.named("transformers", subject) if "transformers" in peers else None
    rows = bench.throughput(subject, peer, work, runs=runs)
    network = network_of(subject.model)
    for row in rows:
        figures = work.figures([[row["s"]]], network)
        row |= {name: figures[name] for name in ("gbps", "floor_percent") if name in figures}
    del subject, peer
    rows += vllm_rows(random, peers, work, runs, network)
    lengths = f"prompts {prompt[0]} to {prompt[1]}, outputs {output[0]} to {output[1]}"
    title = f"{rows[0]['case']['model']}, {requests} requests, {lengths}, {rows[0]['case']['dtype']}"
    columns = {
        "tok_s": "tok/s",
        "s": "seconds",
        "s_min": "least",
        "s_max": "most",
        "best_batch": "batch",
        "gbps": "GB/s",
        "floor_percent": "% of the floor",
    }
    _report("throughput", rows, title, columns, plot=plot, save=save, commit=commit, json=json)


def check(plot: Path | None, runs: int, vs: str | None, random: str | None) -> tuple[str, ...]:
    """Everything that can be said to be wrong before anything is loaded. The peers' names."""
    from strobe.bench import plots, vllm
    from strobe.errors import StrobeError

    if plot is not None:
        plots.check_path(plot)
    bench_options.check_runs(runs)
    peers = bench_options.names(vs, PEERS)
    if any(name in vllm.MODES for name in peers):
        if random is None:
            raise StrobeError("vLLM is measured on random weights", hint="--random llama3-8b")
        vllm.check_installed()
    return peers


def _subject(
    model: str | None,
    random: str | None,
    engine: list[str] | None,
    *,
    device: str | None,
    dtype: str,
    kernel: str | None,
    linear: str | None,
) -> Subject:
    from strobe.bench.subject import subject

    chosen = settings.load(device=device, kernel=kernel, linear=linear)
    config = bench_options.engine_config(engine, attention_kernel=chosen.kernel, linear_kernel=chosen.linear)
    return subject(model, random, device=devices.resolve(chosen.device), dtype=dtype, config=config)


def network_of(model: Model) -> Network:
    from strobe.bench.ceilings import ceilings
    from strobe.bench.engine_cases import Network

    dtype = str(model.dtype).removeprefix("torch.")
    return Network(
        model.config, model.dtype, ceilings("cuda", dtype) if model.device.type == "cuda" else None
    )


def vllm_rows(
    shape: str | None, peers: tuple[str, ...], case: Case, runs: int, network: Network
) -> list[Row]:
    """vLLM's rows, where it is among the peers; strobe's network should be gone from the GPU by then."""
    from strobe.bench import engine_suite, vllm
    from strobe.bench.memory import let_go

    let_go()
    plan = engine_suite.Plan((case,), runs)
    return [
        row
        for peer in peers
        if peer in vllm.MODES and shape is not None
        for row in engine_suite.in_vllm(shape, peer, plan, network)
    ]


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

    if plot is not None:
        panels = {"latency": ["ttft_ms", "tpot_ms"], "throughput": ["tok_s"]}[bench]
        plots.bars(rows, {field: columns[field] for field in panels}, plot, title)
    if bench_options.finish(bench, rows, save=save, commit=commit, json=json):
        return
    console.write(f"{title}\n\n")
    shown = {field: name for field, name in columns.items() if any(field in row for row in rows)}
    table = [[row["provider"], *(_cell(row, field) for field in shown)] for row in rows]
    console.write_table(["", *shown.values()], table)
    console.write(f"\ntokens hold: {'yes' if rows[0]['checked'] else 'NO'}")
    for row in rows[1:]:
        if "tok_s" in row:
            console.write(f"; strobe: {rows[0]['tok_s'] / row['tok_s']:.2f} times {row['provider']}'s tok/s")
        else:
            console.write(f"; {row['provider']} failed: {row['failed']}")
    console.write("\n")


def _cell(row: dict[str, Any], field: str) -> str:
    return f"{row[field]:.4g}" if field in row else "–"
