"""`strobe bench engine`: the engine over published shapes, beside vLLM: what the committed results hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from strobe import device as devices
from strobe import settings
from strobe.cli import bench_options, console, options
from strobe.cli.bench_engine import PEERS, Vs
from strobe.errors import UnknownNameError

if TYPE_CHECKING:
    from strobe.bench.results import Row
    from strobe.engine import EngineConfig


def engine(
    suite: Annotated[str, typer.Option(help="The cases: standard, or quick for a first look.")] = "standard",
    random: Annotated[
        str | None,
        typer.Option("--random", help="Of the suite's shapes these, by comma.", show_default="all of them"),
    ] = None,
    runs: bench_options.Runs = 3,
    vs: Vs = None,
    engine: bench_options.EngineOptions = None,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    kernel: options.Kernel = None,
    linear: options.Linear = None,
    save: options.Save = None,
    add: Annotated[
        bool, typer.Option("--add", help="Keep the file's rows of other models and engines.")
    ] = False,
    commit: options.Commit = None,
    json: options.Json = False,
) -> None:
    """Batches and loads over published shapes with random weights: ms a token, tok/s, % of the floor.

    Greedy tokens are first held against the logits of PyTorch's own calls. The file is written after every
    row, so that a run that is cut short keeps what it measured.
    """
    from strobe.bench import engine_suite, engine_tables, vllm
    from strobe.bench.ceilings import ceilings
    from strobe.bench.results import Result, default_path
    from strobe.checkpoints.load import DTYPES

    bench_options.check_runs(runs)
    if suite not in engine_suite.SUITES:
        raise UnknownNameError.among("suite", suite, engine_suite.SUITES)
    cases = engine_suite.SUITES[suite]
    peers = bench_options.names(vs, PEERS)
    if any(name in vllm.MODES for name in peers):
        vllm.check_installed()
    shapes = _shapes(random, list(cases))
    chosen = settings.load(device=device, kernel=kernel, linear=linear)
    where = devices.resolve(chosen.device)
    if dtype == "auto":
        dtype = "bfloat16" if where.startswith("cuda") else "float32"
    if dtype not in DTYPES:
        raise UnknownNameError.among("dtype", dtype, ["auto", *DTYPES])

    def configure(context: int) -> EngineConfig:
        return bench_options.engine_config(
            engine,
            max_model_len=context,
            prefix_cache=False,
            attention_kernel=chosen.kernel,
            linear_kernel=chosen.linear,
        )

    configure(4096)
    path = default_path("engine") if save is not None and str(save) == "auto" else save
    before = Result.load(path) if add and path is not None and path.is_file() else None
    roof = ceilings(where.partition(":")[0], dtype)
    rows: list[Row] = []
    for shape in shapes:
        plan = engine_suite.Plan(cases[shape], runs, peers)
        for row in engine_suite.measure(shape, plan, roof, device=where, dtype=dtype, configure=configure):
            rows.append(row)
            all_rows = engine_suite.merged(before, rows)
            result = Result.here("engine", all_rows, commit=commit, ceilings=roof.as_dict())
            if path is not None:
                result.save(path)
            console.note(engine_tables.line(row))
    if json:
        console.write_json(result.__dict__)
    else:
        console.write(engine_tables.table(rows))


def _shapes(random: str | None, known: list[str]) -> list[str]:
    if random is None:
        return known
    found = [name.strip() for name in random.split(",")]
    for name in found:
        if name not in known:
            raise UnknownNameError.among("shape of this suite", name, known)
    return found
