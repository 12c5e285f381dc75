"""What the benchmarks of kernels share: their flags, what is to run, and how it is measured and written."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from strobe import device as devices
from strobe import settings
from strobe.attention import ladder
from strobe.cli import bench_options, console
from strobe.errors import KernelRefusedError, StrobeError

if TYPE_CHECKING:
    from strobe.attention.cases import Case
    from strobe.bench.attention import Provider
    from strobe.bench.ceilings import Ceilings
    from strobe.bench.results import Row

Heads = Annotated[int, typer.Option(help="Query heads.")]
KvHeads = Annotated[int | None, typer.Option(min=1, help="Key heads.", show_default="--heads")]
HeadDim = Annotated[int, typer.Option(help="Size of a head.")]
Causal = Annotated[bool, typer.Option("--causal", help="Each query sees the keys up to its own.")]
Dtype = Annotated[
    str | None,
    typer.Option(help="float32, bfloat16 or float16.", show_default="bfloat16 on a GPU, float32 on a CPU"),
]
Kernels = Annotated[str, typer.Option("--kernel", "-k", help="Kernels, by name; `all` that fit.")]
Host = Annotated[
    bool, typer.Option("--host", help="Time what a call costs the host instead: strobe.attention and peers.")
]
Csv = Annotated[bool, typer.Option("--csv", help="Print CSV on stdout.")]


def target(device: str | None, dtype: str | None) -> tuple[str, str]:
    """The device type and the dtype that `--device` and `--dtype` ask for."""
    where = devices.resolve(settings.load(device=device).device).partition(":")[0]
    return where, dtype or ("bfloat16" if where == "cuda" else "float32")


def providers(phase: str, kernel: str, vs: str = "", tile: str | None = None) -> list[Provider]:
    """What `--kernel`, `--vs` and `--tile` name: rungs of a phase's ladder, then peers.

    Raises:
        UnknownNameError: no kernel, or no peer, has this name.
        KernelRefusedError: a kernel without such tile sizes.
        StrobeError: a peer that cannot run on this machine.
    """
    from strobe.bench import peers
    from strobe.bench.attention import of_peer, of_rung, tile_names

    every = ladder.DECODE if phase == "decode" else ladder.PREFILL
    rungs = every if kernel == "all" else [ladder.find(name, phase) for name in kernel.split(",")]
    sizes = None if tile is None else tile_sizes(tile)
    if sizes is not None and kernel == "all":
        rungs = [rung for rung in rungs if sizes.keys() <= set(tile_names(rung))]
        if not rungs:
            raise KernelRefusedError(f"no kernel has tile sizes {', '.join(sizes)}")
    settled = [
        of_rung(rung, settled=True)
        for rung in rungs
        if phase == "decode" and str(rung) in ladder.FASTEST_FIRST[phase] and rung.reads_settled
    ]
    named = peers.named([name for name in vs.split(",") if name])
    for peer in named:
        if reason := peer.missing():
            raise StrobeError(f"{peer.name} cannot run here: {reason}")
    return [*(of_rung(rung, sizes) for rung in rungs), *settled, *map(of_peer, named)]


def measure(
    cases: Sequence[Case],
    chosen: Sequence[Provider],
    dtype: str,
    where: str,
    *,
    kernel: str = "all",
    replay: bool = False,
    budget_ms: float | None = 200.0,
    leave_out: Callable[[Provider, Case], bool] = lambda provider, case: False,
) -> tuple[list[Row], Ceilings]:
    """Rows of every case, and the ceilings. An interrupt keeps the cases that are done. Without a budget for
    each kernel nothing is timed.

    A `kernel` that was named must run every case, unless it stands beside peers: then who runs none, kernel
    or peer, is told on stderr with its reasons.

    Raises:
        KernelRefusedError: nothing runs, or a kernel that was named does not.
    """
    from strobe.bench.attention import measure_all, torch_dtype
    from strobe.bench.ceilings import ceilings

    rows: list[Row] = []
    peers = [each.name for each in chosen if not each.is_rung]
    strict = kernel != "all" and not peers
    roof = ceilings(where, dtype)
    bar, task = console.progress(len(cases), "shapes")
    done = 0
    try:
        with bar:
            for case in cases:
                some = [each for each in chosen if not leave_out(each, case)]
                rows += measure_all(
                    [case], some, dtype, where, strict=strict, replay=replay, budget_ms=budget_ms
                )
                bar.advance(task)
                done += 1
    except KeyboardInterrupt:
        if not rows:
            raise
        console.note(f"stopped: {done} of {len(cases)} shapes are measured")
        return rows, roof
    ran = {row["provider"] for row in rows}
    idle = [each for each in chosen if each.name not in ran]
    if not rows:
        problem = cases[0].inputs(torch_dtype(dtype), where).problem
        reasons = "; ".join(f"{each.name}: {', '.join(each.refusals(problem))}" for each in idle)
        raise KernelRefusedError(f"nothing runs ({problem}): {reasons}")
    for each in idle:
        if kernel != "all" or each.name in peers:
            problem = cases[0].inputs(torch_dtype(dtype), where).problem
            console.note(f"{each.name} does not run ({problem}): {', '.join(each.refusals(problem))}")
    return rows, roof


def host_cost(
    cases: Sequence[Case], vs: str, dtype: str, *, save: Path | None, commit: str | None, json: bool
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
    if not number.isdecimal() or not 0 < int(number) <= 1 << 24:
        raise StrobeError(f"length {text!r}; supported: 1 to 16384k, as 512 or 4k")
    return int(number) * (1024 if kilo else 1)


def tile_sizes(text: str) -> dict[str, int]:
    """ "q=64,k=128" → {"q": 64, "k": 128}."""
    sizes = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if not name.strip().isidentifier() or not size.strip().isdecimal():
            raise StrobeError(f"tile {text!r}; supported: name=size pairs, as q=64,k=128")
        sizes[name.strip()] = int(size)
    return sizes


def write_csv(rows: Sequence[Row]) -> None:
    """A line a row; a case's fields come first."""
    flat = [{**row["case"], **{k: v for k, v in row.items() if k != "case"}} for row in rows]
    columns = list(dict.fromkeys(name for row in flat for name in row))
    writer = csv.DictWriter(sys.stdout, columns)
    writer.writeheader()
    writer.writerows(flat)
