"""`strobe bench decode`: attention of few queries over a cache, against the bytes that it must read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from strobe.cli import bench_kernels as shared
from strobe.cli import bench_options, console, options
from strobe.errors import StrobeError, UnknownNameError

if TYPE_CHECKING:
    from strobe.attention.cases import Case
    from strobe.bench.ceilings import Ceilings
    from strobe.bench.results import Row

Vs = Annotated[str, typer.Option(help="Peers to time beside: fa3, fa3_contiguous, flashinfer.")]


def decode(
    suite: Annotated[
        str | None,
        typer.Option(
            help="A set of shapes: standard, context, all, quick or dense; append: the cache's own kernel.",
            show_default=False,
        ),
    ] = None,
    batch: Annotated[int, typer.Option(help="Rows.")] = 1,
    context: Annotated[str, typer.Option(help="Keys of a row, several by comma: 4k,16k.")] = "4k",
    mixed: Annotated[
        bool, typer.Option("--mixed", help="One row of --context, the others 64 to 4k at random.")
    ] = False,
    q_len: Annotated[int, typer.Option(help="New tokens of a row.")] = 1,
    heads: shared.Heads = 32,
    kv_heads: shared.KvHeads = None,
    head_dim: shared.HeadDim = 128,
    page_size: Annotated[int, typer.Option(help="Tokens of a page; 0 for a dense cache.")] = 16,
    float8: Annotated[bool, typer.Option("--float8", help="A float8 cache, with a scale a head.")] = False,
    dtype: shared.Dtype = None,
    device: options.Device = None,
    kernel: shared.Kernels = "all",
    vs: Vs = "",
    host: shared.Host = False,
    plot: options.Plot = None,
    csv: shared.Csv = False,
    save: options.Save = None,
    commit: options.Commit = None,
    json: options.Json = False,
) -> None:
    """Check, then time decode kernels and peers: µs, GB/s, and the share of the measured read ceiling.

    On a GPU by CUDA-graph replay over caches that together outgrow the L2 cache, pages shuffled. Launches
    follow one another in turn; beside that the production kernel is timed as the engine runs it, "settled": a
    launch starts, and reads old keys, beside the end of the one ahead. No peer does that. The figure is of
    the ceiling's share against the context, a panel for each batch.
    """
    from strobe.attention.cases import decode_shape
    from strobe.bench import append, decode_figure, plots
    from strobe.bench import decode as bench
    from strobe.bench.attention import torch_dtype
    from strobe.bench.ceilings import ceilings
    from strobe.bench.results import Result

    if plot is not None:
        plots.check_path(plot)
    shape = decode_shape(batch, 1, heads, kv_heads or heads, head_dim, page_size)
    if suite is not None and suite not in (*bench.SUITES, "append"):
        raise UnknownNameError.among("suite", suite, [*bench.SUITES, "append"])
    if suite == "append" and shape.layout == "dense":
        raise StrobeError("--suite append with --page-size 0; supported: pages")
    asked = () if suite is not None else _cases(shape, batch, context, mixed, q_len, float8)
    cases = bench.SUITES.get(suite, ()) if suite is not None else asked
    where, dtype = shared.target(device, dtype)
    if host:
        shared.host_cost(cases, vs, dtype, save=save, commit=commit, json=json)
        return
    if suite == "append":
        rows = list(append.measure(shape, append.TOKENS, torch_dtype(dtype), where))
        roof = ceilings(where, dtype)
    else:
        chosen = shared.providers("decode", kernel, vs)
        # 100 ms are hundreds of launches of 5 to 500 µs
        rows, roof = shared.measure(cases, chosen, dtype, where, kernel=kernel, budget_ms=100.0)
    if plot is not None:
        result = Result.here("decode", rows, commit=commit, ceilings=roof.as_dict())
        decode_figure.against_context(result, plot)
    name = {"append": "append", "dense": "decode_dense"}.get(suite or "", "decode")
    if bench_options.finish(name, rows, save=save, commit=commit, json=json, ceilings=roof.as_dict()):
        return
    if csv:
        shared.write_csv(rows)
    else:
        console.write_table(
            ["shape", "provider", "µs", "GB/s", "% of the read ceiling", "range, µs"], _lines(rows, roof)
        )


def _cases(shape: Case, batch: int, context: str, mixed: bool, q_len: int, float8: bool) -> tuple[Case, ...]:
    from dataclasses import replace

    from strobe.bench import decode as bench

    if batch < 1 or q_len < 1:
        raise StrobeError(f"batch {batch}, q_len {q_len}; supported: 1 and up")
    if mixed and shape.layout == "dense":
        raise StrobeError("--mixed with --page-size 0; supported: pages", hint="dense rows are of one length")
    found = []
    for length in map(shared.length, context.split(",")):
        case = replace(shape, name=f"{shape.name}@{length}", rows=((1, length),) * batch)
        if mixed:
            case = bench.mixed(batch, length, (min(64, length), min(4096, length)), shape=shape)
        if q_len > 1:
            case = bench.drafts(case, q_len)
        found.append(bench.float8(case) if float8 else case)
    return tuple(found)


def _lines(rows: list[Row], roof: Ceilings) -> list[list[str]]:
    from strobe.bench import tables

    lines = []
    for row in rows:
        name = tables.case_name(row["case"])
        if not row["checked"]:
            lines.append([name, row["provider"], "WRONG", "", "", f"error {row['error']:.3g}"])
            continue
        spread = f"{row['ms_min'] * 1e3:.4g} to {row['ms_max'] * 1e3:.4g}"
        share = f"{row['gbps'] / roof.read_gbps:.1%}"
        lines.append([name, row["provider"], f"{row['ms'] * 1e3:.4g}", f"{row['gbps']:.4g}", share, spread])
    return lines
