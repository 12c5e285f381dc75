"""`strobe bench attention`, `memory` and `roofline`: kernels beside their peers over shapes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from strobe import device as devices
from strobe.cli import bench_kernels as shared
from strobe.cli import bench_options, console
from strobe.cli.options import Commit, Device, Json, Plot, Save
from strobe.errors import StrobeError, UnknownNameError

if TYPE_CHECKING:
    from strobe.attention.cases import Case
    from strobe.bench.attention import Provider
    from strobe.bench.ceilings import Ceilings
    from strobe.bench.results import Row

Batch = Annotated[int, typer.Option(help="Rows.")]
Seq = Annotated[str, typer.Option(help="Lengths, with --sweep several: 512,1k,16k.")]
Vs = Annotated[str, typer.Option(help="Peers to time beside: fa2, cudnn, fa3, fa4.")]
Suite = Annotated[
    str | None,
    typer.Option(
        help="A standard set of shapes: prefill, small or ladder, or few: prefill-quick, ladder-quick."
    ),
]
TileSizes = Annotated[
    str | None,
    typer.Option("--tile", help="Tile sizes, as q=64,k=128; of all kernels, those that have them."),
]
Replay = Annotated[
    bool, typer.Option("--replay", help="Time by CUDA-graph replay: without the host's share.")
]


def attention(
    batch: Batch = 1,
    seq: Seq = "4k",
    heads: shared.Heads = 16,
    kv_heads: shared.KvHeads = None,
    head_dim: shared.HeadDim = 128,
    causal: shared.Causal = False,
    dtype: shared.Dtype = None,
    device: Device = None,
    kernel: shared.Kernels = "all",
    vs: Vs = "",
    sweep: Annotated[bool, typer.Option("--sweep", help="Time every length of --seq.")] = False,
    suite: Suite = None,
    tile: TileSizes = None,
    host: shared.Host = False,
    replay: Replay = False,
    plot: Plot = None,
    csv: shared.Csv = False,
    save: Save = None,
    commit: Commit = None,
    json: Json = False,
) -> None:
    """Check, then time attention kernels and peers over one shape, a sweep or a suite, in one run.

    These are prefill's shapes, as many queries as keys; `strobe bench decode` has decode's.
    """
    from strobe.attention.cases import (
        LADDER_SHAPES,
        PREFILL_BENCH,
        SMALL_BENCH,
        STANDARD_BENCH,
        prefill_shape,
    )
    from strobe.bench import plots, tables

    if plot is not None:
        plots.check_path(plot)
    lengths = [shared.length(text) for text in seq.split(",")]
    if len(lengths) > 1 and not sweep:
        raise StrobeError(f"--seq {seq} has several lengths", hint="add --sweep")
    suites = {
        "prefill": PREFILL_BENCH,
        "small": SMALL_BENCH,
        "prefill-quick": PREFILL_BENCH[1::6],
        "ladder": (*LADDER_SHAPES, *STANDARD_BENCH),
        "ladder-quick": LADDER_SHAPES,
    }
    if suite is not None and suite not in suites:
        raise UnknownNameError.among("suite", suite, suites)
    if suite is not None:
        cases = list(suites[suite])
    else:
        cases = [prefill_shape(batch, n, heads, kv_heads or heads, head_dim, causal) for n in lengths]
    where, dtype = shared.target(device, dtype)
    if host:
        shared.host_cost(cases, vs, dtype, save=save, commit=commit, json=json)
        return
    chosen = shared.providers("prefill", kernel, vs, tile)

    def leave_out(provider: Provider, case: Case) -> bool:
        """Its tiles are a Python loop: of the standard shapes the largest would take 17 s a call."""
        return provider.name == "strobe:torch_online" and case in STANDARD_BENCH

    rows, roof = shared.measure(
        cases,
        chosen,
        dtype,
        where,
        kernel=kernel,
        replay=replay,
        budget_ms=100.0 if (suite or "").startswith("ladder") else 200.0,  # its kernels are far apart
        leave_out=leave_out,
    )
    if plot is not None:
        title = f"{tables.case_name(rows[0]['case'], lengths=False)}, {dtype}"
        plots.against_length(rows, plot, title)
    bench = (suite or "attention").partition("-")[0]
    if bench_options.finish(bench, rows, save=save, commit=commit, json=json, ceilings=roof.as_dict()):
        return
    if csv:
        shared.write_csv(rows)
    else:
        _write_table(rows, roof)


def memory(
    batch: Batch = 1,
    seq: Seq = "1k,2k,4k",
    heads: shared.Heads = 8,
    kv_heads: shared.KvHeads = None,
    head_dim: shared.HeadDim = 64,
    causal: shared.Causal = False,
    dtype: shared.Dtype = None,
    save: Save = None,
    commit: Commit = None,
    json: Json = False,
) -> None:
    """Peak device memory of each kernel beyond its inputs and output, in MiB, as a markdown table."""
    from strobe.attention.cases import prefill_shape
    from strobe.bench import tables

    if not devices.has_gpu():
        raise StrobeError("torch sees no NVIDIA GPU, and nobody counts what a call takes on a CPU")
    where, dtype = shared.target("cuda", dtype)
    lengths = [shared.length(text) for text in seq.split(",")]
    cases = [prefill_shape(batch, n, heads, kv_heads or heads, head_dim, causal) for n in lengths]
    rows, _ = shared.measure(cases, shared.providers("prefill", "all"), dtype, where, budget_ms=None)
    if not bench_options.finish("memory", rows, save=save, commit=commit, json=json):
        console.write(tables.by_provider(rows, tables.memory))


def roofline(
    dtype: shared.Dtype = None,
    device: Device = None,
    vs: Vs = "",
    seq: Annotated[str, typer.Option(help="Length of the prefill shape.")] = "4k",
    plot: Plot = None,
    save: Save = None,
    commit: Commit = None,
    json: Json = False,
) -> None:
    """Measure this machine's ceilings, then place every kernel and peer under them.

    Three columns: attention of one query a row (decode), a product with one token (decode) and with
    many (prefill), and attention of a whole prompt (prefill).
    """
    from strobe.attention.cases import decode_shape, prefill_shape
    from strobe.bench import linear, plots
    from strobe.bench.results import Result

    if plot is not None:
        plots.check_path(plot)
    where, dtype = shared.target(device, dtype)
    on_gpu = where == "cuda"
    heads = 16 if on_gpu else 4
    prefill = prefill_shape(1, shared.length(seq) if on_gpu else 512, heads, heads, 128, False)
    decode = decode_shape(16 if on_gpu else 4, 8192 if on_gpu else 1024, 32, 8, 128)
    rows: list[Row] = []
    for phase, case in (("prefill", prefill), ("decode", decode)):
        measured, roof = shared.measure([case], shared.providers(phase, "all", vs), dtype, where)
        rows += measured
    tokens, inputs, outputs = (4096, 4096, 14336) if on_gpu else (256, 512, 1408)
    arch = devices.gpu().arch if on_gpu else 0
    rows += linear.measure_all([(1, inputs, outputs), (tokens, inputs, outputs)], dtype, where, arch)
    if plot is not None:
        plots.roofline(Result.here("roofline", rows, commit=commit, ceilings=roof.as_dict()), plot)
    if bench_options.finish("roofline", rows, save=save, commit=commit, json=json, ceilings=roof.as_dict()):
        return
    table = []
    for row in (row for row in rows if row["checked"]):
        attainable = min(roof.matmul_tflops, roof.read_gbps * row["intensity"] * 1e-3)
        share = f"{row['tflops'] / attainable:.1%}"
        table.append([row["provider"], f"{row['intensity']:.4g}", f"{row['tflops']:.4g}", share])
    console.write_table(["provider", "FLOP a byte", "TFLOP/s", "% of the roof"], table)


def _write_table(rows: list[Row], roof: Ceilings) -> None:
    from strobe.bench import tables

    table = []
    for row in rows:
        name = tables.case_name(row["case"])
        if not row["checked"]:
            table.append([name, row["provider"], "WRONG", "", "", f"error {row['error']:.3g}"])
            continue
        share = f"{row['tflops'] / roof.matmul_tflops:.1%}"
        spread = f"{row['ms_min']:.4g} to {row['ms_max']:.4g}"
        table.append([name, row["provider"], f"{row['ms']:.4g}", f"{row['tflops']:.4g}", share, spread])
    console.write_table(["shape", "provider", "ms", "TFLOP/s", "% of ceiling", "range, ms"], table)
