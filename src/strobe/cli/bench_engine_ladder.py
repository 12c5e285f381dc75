"""`strobe bench engine-ladder`: one Llama through the engine, a kernel faster at each step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from strobe import device as devices
from strobe import settings
from strobe.cli import bench_engine, bench_options, console, options

if TYPE_CHECKING:
    from strobe.bench.results import Row


def engine_ladder(
    model: options.Model = None,
    random: bench_options.Random = None,
    prompt: bench_options.Prompt = 128,
    output: bench_options.Output = 128,
    runs: bench_options.Runs = 3,
    vs: bench_engine.Vs = None,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    save: options.Save = None,
    commit: options.Commit = None,
    json: options.Json = False,
) -> None:
    """Tokens a second of one Llama, one request, with naive kernels, then with each faster one added.

    Every configuration's greedy tokens are first held against the logits of PyTorch's own calls. The peers
    of --vs stand below the last.
    """
    from strobe.bench import engine_ladder as bench
    from strobe.bench.engine_cases import Batch
    from strobe.bench.subject import find_network

    peers = bench_engine.check(None, runs, vs, random)
    where = devices.resolve(settings.load(device=device).device)
    network, _, name, folder = find_network(model, random, device=where, dtype=dtype)
    configurations = bench.ON_GPU if where.startswith("cuda") else bench.ON_CPU
    rows: list[Row] = []
    bar, task = console.progress(len(configurations), "engines")
    try:
        with bar:
            for row in bench.measure(
                network, name, configurations, folder=folder, prompt=prompt, output=output, runs=runs
            ):
                rows.append(row)
                bar.advance(task)
    except KeyboardInterrupt:
        if not rows:
            raise
        peers = ()
        console.note(f"stopped: {len(rows)} of {len(configurations)} engines are measured")
    if "transformers" in peers:
        rows.append(
            bench.transformers_row(network, name, folder=folder, prompt=prompt, output=output, runs=runs)
        )
    known = bench_engine.network_of(network)
    del network
    rows += bench_engine.vllm_rows(random, peers, Batch(1, prompt, output), runs, known)
    if bench_options.finish("engine_ladder", rows, save=save, commit=commit, json=json):
        return
    case = rows[0]["case"]
    named = name if folder is not None else f"{name} (random weights)"
    console.write(f"{named}, prompt {prompt}, output {output}, {case['dtype']} on {where}\n\n")
    console.write_table(
        ["engine", "attention", "matmul", "first token, ms", "tok/s", "GB/s", "% of the floor", ""],
        _lines(rows),
    )
    if configurations is bench.ON_CPU:
        kernels = (f"{c.name} ({c.attention_kernel} + {c.linear_kernel})" for c in bench.ON_GPU)
        console.write(f"\non an NVIDIA GPU: {', '.join(kernels)}\n")


def _lines(rows: list[Row]) -> list[list[str]]:
    lines, before = [], None
    for row in rows:
        kernels = [row.get(field, "–") for field in ("attention_kernel", "linear_kernel")]
        head = [row["provider"].removeprefix("strobe:"), *kernels]
        if "tok_s" not in row:
            why = row.get("refused") or row.get("failed") or f"WRONG from token {row['first_wrong']}"
            lines.append([*head, "–", "–", "–", "–", why])
            continue
        over = ""
        if before is not None and "linear_kernel" in row:
            over = f"{row['tok_s'] / before:.2f} times the one before"
        figures = [f"{row[field]:.4g}" for field in ("ttft_ms", "tok_s", "gbps")]
        figures.append(f"{row['floor_percent']:.3g}" if "floor_percent" in row else "–")
        lines.append([*head, *figures, over])
        before = row["tok_s"]
    return lines
