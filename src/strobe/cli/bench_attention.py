"""`strobe bench attention`, `memory` and `roofline`: kernels beside their peers over shapes."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from strobe import device as devices
from strobe import settings
from strobe.attention import ladder
from strobe.cli import bench_options, console
from strobe.cli.options import Commit, Device, Json, Plot, Save
from strobe.errors import KernelRefusedError, StrobeError, UnknownNameError

if TYPE_CHECKING:
    from strobe.attention.cases import Case

Batch = Annotated[int, typer.Option(help="Rows.")]
Seq = Annotated[str, typer.Option(help="Lengths, with --sweep several: 512,1k,16k.")]
Heads = Annotated[int, typer.Option(help="Query heads.")]
KvHeads = Annotated[int | None, typer.Option(help="Key heads.", show_default="--heads")]
HeadDim = Annotated[int, typer.Option(help="Size of a head.")]
Causal = Annotated[bool, typer.Option("--causal", help="Each query sees the keys up to its own.")]
Dtype = Annotated[
    str | None,
    typer.Option(help="float32, bfloat16 or float16.", show_default="bfloat16 on a GPU, float32 on a CPU"),
]
Kernels = Annotated[str, typer.Option("--kernel", "-k", help="Kernels, by name; `all` that fit.")]
Vs = Annotated[str, typer.Option(help="Peers to time beside: fa2, cudnn, fa3, fa4, flashinfer.")]
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
Host = Annotated[
    bool, typer.Option("--host", help="Time what a call costs the host instead: strobe.attention and peers.")
]
Replay = Annotated[
    bool, typer.Option("--replay", help="Time by CUDA-graph replay: without the host's share.")
]
Csv = Annotated[bool, typer.Option("--csv", help="Print CSV on stdout.")]


def attention(
    batch: Batch = 1,
    seq: Seq = "4k",
    heads: Heads = 16,
    kv_heads: KvHeads = None,
    head_dim: HeadDim = 128,
    causal: Causal = False,
    dtype: Dtype = None,
    device: Device = None,
    kernel: Kernels = "all",
    vs: Vs = "",
    sweep: Annotated[bool, typer.Option("--sweep", help="Time every length of --seq.")] = False,
    suite: Suite = None,
    tile: TileSizes = None,
    host: Host = False,
    replay: Replay = False,
    plot: Plot = None,
    csv: Csv = False,
    save: Save = None,
    commit: Commit = None,
    json: Json = False,
) -> None:
    """Check, then time attention kernels and peers over one shape, a sweep or a suite, in one run."""
    from strobe.attention.cases import (
        LADDER_BENCH,
        LADDER_SHAPES,
        PREFILL_BENCH,
        SMALL_BENCH,
        prefill_shape,
    )
    from strobe.bench import plots, tables
    from strobe.bench.results import Result, default_path

    if plot is not None:
        plots.check_path(plot)
    lengths = [length(text) for text in seq.split(",")]
    if len(lengths) > 1 and not sweep:
        raise StrobeError(f"--seq {seq} has several lengths", hint="add --sweep")
    suites = {
        "prefill": PREFILL_BENCH,
        "small": SMALL_BENCH,
        "prefill-quick": PREFILL_BENCH[1::6],
        "ladder": LADDER_BENCH,
        "ladder-quick": LADDER_SHAPES,
    }
    if suite is not None and suite not in suites:
        raise UnknownNameError.among("suite", suite, suites)
    if suite is not None:
        cases = list(suites[suite])
    else:
        cases = [prefill_shape(batch, n, heads, kv_heads or heads, head_dim, causal) for n in lengths]
    where = devices.resolve(settings.load(device=device).device).partition(":")[0]
    dtype = dtype or ("bfloat16" if where == "cuda" else "float32")
    if host:
        host_cost(cases, vs, dtype, save=save, commit=commit, json=json)
        return
    rows, roof = measure(cases, "prefill", kernel, vs, tile, dtype, where, replay=replay)
    bench = (suite or "attention").partition("-")[0]
    result = Result.here(bench, rows, commit=commit, ceilings=roof.as_dict())
    if save is not None:
        result.save(default_path(bench) if str(save) == "auto" else save)
    if plot is not None:
        shape = tables.case_name(rows[0]["case"], lengths=False) if rows else "nothing ran"
        plots.against_length(rows, plot, f"{shape}, {dtype}")
    if json:
        console.write_json(result.__dict__)
    elif csv:
        write_csv(rows)
    else:
        _write_table(rows, roof)


def memory(
    batch: Batch = 1,
    seq: Seq = "1k,2k,4k",
    heads: Heads = 8,
    kv_heads: KvHeads = None,
    head_dim: HeadDim = 64,
    causal: Causal = False,
    dtype: Dtype = None,
    save: Save = None,
    commit: Commit = None,
    json: Json = False,
) -> None:
    """Peak device memory of each kernel beyond its inputs and output, in MiB, as a markdown table."""
    from strobe.attention.cases import prefill_shape
    from strobe.bench import tables
    from strobe.bench.results import Result, default_path

    devices.resolve("cuda")
    lengths = [length(text) for text in seq.split(",")]
    cases = [prefill_shape(batch, n, heads, kv_heads or heads, head_dim, causal) for n in lengths]
    rows, _ = measure(cases, "prefill", "all", "", None, dtype or "bfloat16", "cuda")
    result = Result.here("memory", rows, commit=commit)
    if save is not None:
        result.save(default_path("memory") if str(save) == "auto" else save)
    if json:
        console.write_json(result.__dict__)
    else:
        console.write(tables.by_provider(rows, tables.memory))


def roofline(
    dtype: Dtype = None,
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
    from strobe.bench.results import Result, default_path

    if plot is not None:
        plots.check_path(plot)
    where = devices.resolve(settings.load(device=device).device).partition(":")[0]
    dtype = dtype or ("bfloat16" if where == "cuda" else "float32")
    on_gpu = where == "cuda"
    prefill = prefill_shape(
        1, length(seq) if on_gpu else 512, 16 if on_gpu else 4, 16 if on_gpu else 4, 128, False
    )
    decode = decode_shape(16 if on_gpu else 4, 8192 if on_gpu else 1024, 32, 8, 128)
    rows, roof = measure([prefill], "prefill", "all", vs, None, dtype, where)
    rows += measure([decode], "decode", "all", vs, None, dtype, where)[0]
    tokens, inputs, outputs = (4096, 4096, 14336) if on_gpu else (256, 512, 1408)
    arch = devices.gpu().arch if on_gpu else 0
    rows += linear.measure_all([(1, inputs, outputs), (tokens, inputs, outputs)], dtype, where, arch)
    result = Result.here("roofline", rows, commit=commit, ceilings=roof.as_dict())
    if save is not None:
        result.save(default_path("roofline") if str(save) == "auto" else save)
    if plot is not None:
        plots.roofline(result, plot)
    if json:
        console.write_json(result.__dict__)
        return
    table = []
    for row in (row for row in rows if row["checked"]):
        attainable = min(roof.matmul_tflops, roof.read_gbps * row["intensity"] * 1e-3)
        share = f"{row['tflops'] / attainable:.1%}"
        table.append([row["provider"], f"{row['intensity']:.4g}", f"{row['tflops']:.4g}", share])
    console.write_table(["provider", "FLOP a byte", "TFLOP/s", "% of the roof"], table)


def measure(
    cases: list[Any],
    phase: str,
    kernel: str,
    vs: str,
    tile: str | None,
    dtype: str,
    where: str,
    *,
    replay: bool = False,
) -> tuple[list[dict[str, Any]], Any]:
    from strobe.bench import peers
    from strobe.bench.attention import measure_all, of_peer, of_rung, tile_names, torch_dtype
    from strobe.bench.ceilings import ceilings

    every = ladder.DECODE if phase == "decode" else ladder.PREFILL
    rungs = every if kernel == "all" else [ladder.find(name, phase) for name in kernel.split(",")]
    sizes = None if tile is None else tile_sizes(tile)
    if sizes is not None and kernel == "all":
        rungs = [rung for rung in rungs if sizes.keys() <= set(tile_names(rung))]
        if not rungs:
            raise KernelRefusedError(f"no kernel has tile sizes {', '.join(sizes)}")
    named = peers.named([name for name in vs.split(",") if name])
    for peer in named:
        if reason := peer.missing():
            raise StrobeError(f"{peer.name} cannot run here: {reason}")
    settled = [
        of_rung(rung, settled=True)
        for rung in rungs
        if phase == "decode" and str(rung) in ladder.FASTEST_FIRST[phase] and rung.reads_settled
    ]
    providers = [*(of_rung(rung, sizes) for rung in rungs), *settled, *map(of_peer, named)]
    rows: list[dict[str, Any]] = []
    roof = ceilings(where, dtype)
    bar, task = console.progress(len(cases), "shapes")
    done = 0
    try:
        with bar:
            for case in cases:
                strict = kernel != "all" and not named
                rows += measure_all([case], providers, dtype, where, strict=strict, replay=replay)
                bar.advance(task)
                done += 1
    except KeyboardInterrupt:
        if not rows:
            raise
        console.note(f"stopped: {done} of {len(cases)} shapes are measured")
    if not rows:
        problem = cases[0].inputs(torch_dtype(dtype), where).problem
        reasons = "; ".join(f"{p.name}: {', '.join(p.refusals(problem))}" for p in providers)
        raise KernelRefusedError(f"nothing runs ({problem}): {reasons}")
    return rows, roof


def host_cost(
    cases: list[Case], vs: str, dtype: str, *, save: Path | None, commit: str | None, json: bool
) -> None:
    """How long a call of `strobe.attention`, and of each peer, keeps the host."""
    from strobe.bench import host, peers, tables

    devices.resolve("cuda")
    rows = list(host.measure_all(cases, peers.named([name for name in vs.split(",") if name]), dtype))
    if bench_options.finish("host", rows, save=save, commit=commit, json=json):
        return
    lines = [
        [
            tables.case_name(row["case"]),
            row["provider"],
            *(f"{row[field]:.4g}" for field in ("host_us", "host_us_min")),
        ]
        for row in rows
    ]
    console.write_table(["shape", "provider", "host, µs a call", "least"], lines)


def length(text: str) -> int:
    """ "4k" → 4096."""
    number, kilo = text.strip().lower().removesuffix("k"), text.strip().lower().endswith("k")
    if not number.isdigit() or not 0 < int(number) <= 1 << 24:
        raise StrobeError(f"length {text!r}; supported: 1 to 16384k, as 512 or 4k")
    return int(number) * (1024 if kilo else 1)


def tile_sizes(text: str) -> dict[str, int]:
    """ "q=64,k=128" → {"q": 64, "k": 128}."""
    sizes = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if not name.strip().isidentifier() or not size.strip().isdigit():
            raise StrobeError(f"tile {text!r}; supported: name=size pairs, as q=64,k=128")
        sizes[name.strip()] = int(size)
    return sizes


def write_csv(rows: list[dict[str, Any]]) -> None:
    flat = [{**row["case"], **{k: v for k, v in row.items() if k != "case"}} for row in rows]
    columns = list(dict.fromkeys(name for row in flat for name in row))
    writer = csv.DictWriter(sys.stdout, columns)
    writer.writeheader()
    writer.writerows(flat)


def _write_table(rows: list[dict[str, Any]], roof: Any) -> None:
    from strobe.bench import tables

    table = []
    for row in rows:
        name = tables.case_name(row["case"])
        if not row["checked"]:
            table.append([name, row["provider"], "WRONG", "", "", f"error {row['error']:.3g}"])
            continue
        rate, most, unit = row["tflops"], roof.matmul_tflops, "TFLOP/s"
        spread = f"{row['ms_min']:.4g} to {row['ms_max']:.4g}"
        table.append(
            [name, row["provider"], f"{row['ms']:.4g}", f"{rate:.4g} {unit}", f"{rate / most:.1%}", spread]
        )
    console.write_table(["shape", "provider", "ms", "rate", "% of ceiling", "range, ms"], table)
