"""`strobe bench startup`: seconds to the first token, and each kernel's to compile and to load."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from strobe import device as devices
from strobe import settings
from strobe.cli import bench_options, console, options
from strobe.errors import StrobeError

if TYPE_CHECKING:
    from strobe.bench.results import Row


def startup(
    model: options.Model = None,
    random: bench_options.Random = None,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Time each kernel's compiling and loading instead.")
    ] = False,
    rungs: Annotated[
        bool, typer.Option("--rungs", help="Time the first call of each kernel of a ladder instead.")
    ] = False,
    arch: Annotated[
        str | None,
        typer.Option(help="With --kernels, as sm_90a; needs no GPU.", show_default="this machine's GPU"),
    ] = None,
    runs: bench_options.Runs = 3,
    engine: bench_options.EngineOptions = None,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    kernel: options.Kernel = None,
    linear: options.Linear = None,
    save: options.Save = None,
    commit: options.Commit = None,
    json: options.Json = False,
) -> None:
    """How long from a new process to the first token, with an empty kernel cache and with a full one."""
    from strobe.bench import startup as bench

    one_of = {"--kernels": kernels, "--rungs": rungs, "--model": model, "--random": random}
    given = [name for name, value in one_of.items() if value not in (None, False)]
    if len(given) > 1:
        raise StrobeError(f"{' and '.join(given)} are both given", hint="give one of them")
    if arch and not kernels:
        raise StrobeError("--arch is for --kernels: the rest runs, and so takes this machine's own")
    if rungs:
        where = devices.resolve(settings.load(device=device).device).partition(":")[0]
        rows = bench.measure_rungs(where, devices.gpu().target if where == "cuda" else "cpu")
        if not bench_options.finish("kernels", rows, save=save, commit=commit, json=json):
            console.write_table(["rung", "first call, s", "in a new process, ms", ""], _rung_lines(rows))
        return
    if kernels:
        from strobe.cuda import jit
        from strobe.cuda.sources import check_arch

        rows = bench.measure_kernels(check_arch(arch or jit.arch_of()))
        if not bench_options.finish("kernels", rows, save=save, commit=commit, json=json):
            console.write_table(
                ["source", "variants", "compile, s", "load, ms", "median"], _kernel_lines(rows)
            )
        return
    bench_options.check_runs(runs)
    context = None
    if random is not None:
        from strobe.models import shapes

        context = min(4096, shapes.named(random).max_position)
    chosen = settings.load(device=device, kernel=kernel, linear=linear)
    config = bench_options.engine_config(
        engine, max_model_len=context, attention_kernel=chosen.kernel, linear_kernel=chosen.linear
    )
    start = bench.Start(model, random, devices.resolve(chosen.device), dtype, asdict(config))
    rows = bench.measure(start, runs)
    if bench_options.finish("startup", rows, save=save, commit=commit, json=json):
        return
    head = ["kernel cache", "import", "weights", "engine", "first token", "in all, s", "range"]
    lines = [
        [
            row["case"]["cache"],
            *(f"{row[phase]:.3g}" for phase in bench.PHASES),
            f"{row['total_s']:.3g}",
            f"{row['total_s_min']:.3g} to {row['total_s_max']:.3g}",
        ]
        for row in rows
    ]
    case = rows[0]["case"]
    console.write(f"{case['model']}, {case['dtype']}, prompt {case['prompt']}\n\n")
    console.write_table(head, lines)


def _kernel_lines(rows: list[Row]) -> list[list[str]]:
    return [
        [
            row["case"]["source"],
            str(row["case"]["variants"]),
            f"{row['compile_s']:.3g}",
            f"{row['load_ms']:.3g}",
            f"{row['load_ms_median']:.3g}",
        ]
        for row in rows
    ]


def _rung_lines(rows: list[Row]) -> list[list[str]]:
    return [
        [row["case"]["rung"], "–", "–", row["refused"]]
        if "refused" in row
        else [
            row["case"]["rung"],
            f"{row['first_s']:.3g}",
            f"{row['later_ms']:.3g}",
            "" if row["checked"] else "WRONG",
        ]
        for row in rows
    ]
