"""`strobe bench profile`: a timeline of decode steps."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from strobe import device as devices
from strobe import settings
from strobe.cli import bench_options, console, options
from strobe.errors import StrobeError

if TYPE_CHECKING:
    from strobe.bench.profile import Part, Profile


def profile(
    model: options.Model = None,
    random: bench_options.Random = None,
    batch: Annotated[int, typer.Option(help="Requests that decode together.")] = 1,
    context: Annotated[int, typer.Option(help="Prompt tokens of each.")] = 128,
    steps: Annotated[int, typer.Option(help="Steps to record.")] = 10,
    top: Annotated[int, typer.Option(help="Kernels to list.")] = 20,
    trace: Annotated[
        Path | None,
        typer.Option(help="Write the timeline here, for chrome://tracing or Perfetto.", show_default=False),
    ] = None,
    engine: bench_options.EngineOptions = None,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    kernel: options.Kernel = None,
    linear: options.Linear = None,
    save: options.Save = None,
    commit: options.Commit = None,
    json: options.Json = False,
) -> None:
    """Where a decode step's time goes: by kernel, by kind with its share of the floor, and between kernels.

    On a GPU its kernels, on a CPU torch's operators; what is neither counts as a gap. What runs beside
    another counts for the one that began first, so that the parts sum to the busy time; "beside others" is
    how long a kind's launches stood beside earlier ones, most of it waiting for them.
    """
    from strobe.bench import profile as bench
    from strobe.bench.ceilings import ceilings
    from strobe.bench.engine_cases import Batch
    from strobe.bench.subject import subject

    if not 1 <= steps <= 1000:
        raise StrobeError(f"steps is {steps}; supported: 1 to 1000")
    if trace is not None and not trace.parent.is_dir():
        raise StrobeError(f"{trace}: no such folder")
    if trace is not None and trace.is_dir():
        raise StrobeError(f"{trace} is a folder; supported: a file to write")
    case = Batch(batch, context, steps + 16)
    chosen = settings.load(device=device, kernel=kernel, linear=linear)
    where = devices.resolve(chosen.device)
    config = bench_options.engine_config(
        engine,
        max_model_len=case.longest if random is not None else None,
        prefix_cache=False,
        attention_kernel=chosen.kernel,
        linear_kernel=chosen.linear,
    )
    measured = subject(model, random, device=where, dtype=dtype, config=config)
    roof = ceilings("cuda", measured.dtype) if where.startswith("cuda") else None
    found = bench.profile(measured, case, steps=steps, roof=roof, trace=trace)
    rows = [{"case": found.case, "provider": "strobe", "checked": None, **asdict(found)}]
    if bench_options.finish("profile", rows, save=save, commit=commit, json=json):
        return
    _write(found, top)


def _write(found: Profile, top: int) -> None:
    case = found.case
    console.write(
        f"{case['model']}, batch {case['batch']}, context {case['prompt']}, {case['dtype']}: "
        f"{found.step_us:.4g} µs a step, {found.busy_us / found.step_us:.0%} of it busy, "
        f"{found.gaps / found.steps:.3g} gaps"
    )
    if found.floor_us is not None:
        console.write(f"; the floor is {found.floor_us:.4g} µs ({found.floor_us / found.step_us:.0%})")
    console.write("\n\n")
    head = ["calls", "µs", "of the step", "beside others, µs"]
    kinds = [
        [
            *_line(part, found),
            "–" if part.bytes is None else console.bytes_text(int(part.bytes)),
            "–" if part.floor_percent is None else f"{part.floor_percent:.0f} %",
        ]
        for part in found.kinds
    ]
    console.write_table(["kind", *head, "reads at least", "of the floor"], kinds)
    console.write("\n")
    console.write_table(["kernel", *head], [_line(part, found) for part in found.kernels[:top]])
    if found.largest_gaps:
        console.write("\n")
        gaps = [[f"{gap.us:.4g}", gap.after, gap.before] for gap in found.largest_gaps]
        console.write_table(["largest gaps, µs", "after", "before"], gaps)


def _line(part: Part, found: Profile) -> list[str]:
    share = f"{part.us / found.step_us:.1%}"
    return [part.name, f"{part.calls:.4g}", f"{part.us:.4g}", share, f"{part.beside_us:.4g}"]
