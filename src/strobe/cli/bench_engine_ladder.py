"""`strobe bench engine-ladder`: one Llama through the engine, a kernel faster at each step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from strobe import device as devices
from strobe import settings
from strobe.cli import console, options
from strobe.errors import StrobeError, UnknownNameError

if TYPE_CHECKING:
    from strobe.bench.results import Row
    from strobe.models.network import Model


def engine_ladder(
    model: options.Model = None,
    random: Annotated[
        str | None,
        typer.Option(
            help="Random weights of a published shape, in a model's place: llama2-7b, llama3-8b or "
            "llama3.2-1b.",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[int, typer.Option(help="Prompt tokens.")] = 128,
    output: Annotated[int, typer.Option(help="Output tokens.")] = 128,
    runs: Annotated[int, typer.Option(help="Times that each is measured.")] = 3,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    save: options.Save = None,
    commit: options.Commit = None,
    json: options.Json = False,
) -> None:
    """Tokens a second of one Llama, one request, with naive kernels, then with each faster one added.

    Every configuration's greedy tokens are first compared with those of PyTorch's own calls.
    """
    from strobe.bench import engine_ladder as bench
    from strobe.bench.results import Result, default_path

    if not 1 <= runs <= 1000:
        raise StrobeError(f"runs is {runs}; supported: 1 to 1000")
    if model is not None and random is not None:
        raise StrobeError("--model and --random are both given", hint="give one of them")
    where = devices.resolve(settings.load(device=device).device)
    network, name = _network(model, random, where, dtype)
    configurations = bench.ON_GPU if where.startswith("cuda") else bench.ON_CPU
    rows: list[Row] = []
    bar, task = console.progress(len(configurations), "engines")
    with bar:
        for row in bench.measure(network, name, configurations, prompt=prompt, output=output, runs=runs):
            rows.append(row)
            bar.advance(task)
    result = Result.here("engine_ladder", rows, commit=commit)
    if save is not None:
        result.save(default_path("engine_ladder") if str(save) == "auto" else save)
    if json:
        console.write_json(result.__dict__)
        return
    case = rows[0]["case"]
    console.write(f"{name}, prompt {prompt}, output {output}, {case['dtype']} on {where}\n\n")
    console.write_table(
        ["engine", "attention", "matmul", "first token, ms", "tok/s", "over the one before", "same tokens"],
        _lines(rows),
    )
    if configurations is bench.ON_CPU:
        kernels = (f"{c.name} ({c.attention_kernel} + {c.linear_kernel})" for c in bench.ON_GPU)
        console.write(f"\non an NVIDIA GPU: {', '.join(kernels)}\n")


def _network(model: str | None, shape: str | None, where: str, dtype: str) -> tuple[Model, str]:
    """The network, and what to call it."""
    from strobe.bench.engine_ladder import random_model
    from strobe.checkpoints.load import DTYPES, load

    if shape is None:
        checkpoint = load(model, device=where, dtype=dtype)
        return checkpoint.model, checkpoint.name
    if dtype == "auto":
        dtype = "bfloat16" if where.startswith("cuda") else "float32"
    if dtype not in DTYPES:
        raise UnknownNameError.among("dtype", dtype, ["auto", *DTYPES])
    return random_model(shape, where, DTYPES[dtype]), f"{shape} (random weights)"


def _lines(rows: list[Row]) -> list[list[str]]:
    lines, before = [], None
    for row in rows:
        head = [row["provider"].removeprefix("strobe:"), row["attention_kernel"], row["linear_kernel"]]
        if "tok_s" not in row:
            lines.append(
                [*head, "–", "–", "–", row.get("refused") or f"WRONG from {row['first_difference']}"]
            )
            continue
        over = "" if before is None else f"{row['tok_s'] / before:.2f}x"
        lines.append(
            [
                *head,
                f"{row['ttft_ms']:.4g}",
                f"{row['tok_s']:.4g}",
                over,
                _same_tokens(row["first_difference"]),
            ]
        )
        before = row["tok_s"]
    return lines


def _same_tokens(first_difference: int | None) -> str:
    return "all" if first_difference is None else f"{first_difference}, then a tie"
