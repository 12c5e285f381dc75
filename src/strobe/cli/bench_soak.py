"""`strobe bench soak`: the engine under random load for a long time."""

from __future__ import annotations

from typing import Annotated

import typer

from strobe import device as devices
from strobe import settings
from strobe.cli import bench_options, console, options


def soak(
    model: options.Model = None,
    random: bench_options.Random = None,
    tokens: Annotated[int, typer.Option(help="Output tokens, of all requests together.")] = 1_000_000,
    in_flight: Annotated[int, typer.Option(help="Requests at a time.")] = 64,
    prompt: Annotated[int, typer.Option(help="Longest prompt.")] = 512,
    output: Annotated[int, typer.Option(help="Longest output.")] = 512,
    seed: Annotated[int, typer.Option(help="Draws the load.")] = 0,
    engine: bench_options.EngineOptions = None,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    kernel: options.Kernel = None,
    linear: options.Linear = None,
    save: options.Save = None,
    commit: options.Commit = None,
    json: options.Json = False,
) -> None:
    """Random lengths, samplings, siblings and aborts over a cache too small for all, then the books.

    The cache holds half of what the requests may need, so that some are preempted (`--engine
    kv_cache_pages=N` for another size). The exit code is 1 where a request was lost or cut short, a page is
    still held, memory grew, or a greedy answer is wrong.
    """
    from strobe.bench import soak as bench
    from strobe.bench.subject import subject

    load = bench.Soak(tokens, in_flight, prompt, output, seed=seed)
    chosen = settings.load(device=device, kernel=kernel, linear=linear)
    where = devices.resolve(chosen.device)
    page_size = 16
    config = bench_options.engine_config(
        engine,
        page_size=page_size,
        kv_cache_pages=max(4, in_flight // 4) * -(-(prompt + output) // page_size),
        max_model_len=prompt + output,
        attention_kernel=chosen.kernel,
        linear_kernel=chosen.linear,
    )
    measured = subject(model, random, device=where, dtype=dtype, config=config)
    bar, task = console.progress(tokens, "tokens")
    with bar:
        row = bench.run(measured, load, lambda done: bar.update(task, completed=done))
    if not bench_options.finish("soak", [row], save=save, commit=commit, json=json):
        growth = [row["host_growth_bytes"], row["device_growth_bytes"]]
        host, gpu = (f"{size / 2**20:+.1f} MiB" for size in growth)
        console.write_table(
            ["", ""],
            [
                ["tokens", f"{row['prompt_tokens']} in, {row['output_tokens']} out, {row['s']:.1f} s"],
                ["requests", f"{row['requests']}: {row['finished']} finished, {row['dropped']} dropped"],
                ["lost, cut short, wrong", f"{row['lost']}, {row['short']}, {row['wrong']}"],
                ["preemptions", str(row["preemptions"])],
                ["prompt tokens found in the cache", str(row["prefix_hits"])],
                ["pages still held", f"{row['used_pages']} of {row['case']['pages']}"],
                ["memory gained over the second half", f"host {host}, GPU {gpu}"],
            ],
        )
    if not row["checked"]:
        raise typer.Exit(1)
