"""`strobe verify`: the same weights through strobe and transformers."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from strobe import device as devices
from strobe import settings
from strobe.cli import bench_options, console, options

if TYPE_CHECKING:
    from strobe.bench.verify import Verification


def verify(
    model: Annotated[
        str | None,
        typer.Argument(help="A Hugging Face folder or hub name.", show_default="the bundled model"),
    ] = None,
    random: Annotated[
        str | None,
        typer.Option(
            "--random",
            help="Random weights of published shapes, by comma, in a model's place; `all` of them.",
            show_default=False,
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", help="Greedy tokens of each prompt.")] = 64,
    engine: bench_options.EngineOptions = None,
    device: options.Device = None,
    dtype: options.Dtype = "float32",
    kernel: options.Kernel = None,
    linear: options.Linear = None,
    save: options.Save = None,
    commit: options.Commit = None,
    json: options.Json = False,
) -> None:
    """Run the same weights through strobe and transformers: logits, greedy tokens, speeds.

    The exit code is 1 where a logit differs by more than 0.001 times the largest one in float32 (0.1 times in
    bfloat16), or the first token that differs is more than that from a tie.
    """
    from strobe.bench.memory import let_go
    from strobe.bench.results import Result, default_path
    from strobe.bench.subject import subject
    from strobe.bench.verify import verify as compare
    from strobe.models import shapes

    chosen = settings.load(device=device, kernel=kernel, linear=linear)
    where = devices.resolve(chosen.device)
    names = [None] if random is None else list(shapes.SHAPES) if random == "all" else random.split(",")
    found: list[Verification] = []
    for name in names:
        context = None if name is None else min(4096, shapes.named(name).max_position)
        config = bench_options.engine_config(
            engine, max_model_len=context, attention_kernel=chosen.kernel, linear_kernel=chosen.linear
        )
        one = subject(model, name, device=where, dtype=dtype, config=config)
        found.append(compare(one, max_tokens))
        del one
        let_go()
        if not json:
            _write(found[-1])
        if save is not None:
            rows = [
                {
                    "case": {"model": each.model, "dtype": each.dtype},
                    "provider": "strobe",
                    "checked": each.agrees,
                    **asdict(each),
                }
                for each in found
            ]
            result = Result.here("verify", rows, commit=commit)
            result.save(default_path("verify") if str(save) == "auto" else save)
    if json:
        told = [{**asdict(each), "agrees": each.agrees} for each in found]
        console.write_json(told[0] if random is None else told)
    if not all(each.agrees for each in found):
        raise typer.Exit(1)


def _write(found: Verification) -> None:
    ratio = found.strobe_tokens_per_s / found.transformers_tokens_per_s
    lines = [
        ["model", f"{found.model}, {found.dtype} on {found.device}"],
        [
            "largest logit difference",
            f"{found.logit_difference:.2e} (largest logit {found.largest_logit:.3g})",
        ],
        ["same likeliest token", f"at {found.same_choice} of {found.positions} positions"],
        ["greedy tokens equal", f"{found.greedy_equal} of {found.greedy_tokens}"],
    ]
    lines += [
        [
            f"prompt {each.prompt + 1} differs at {each.at}",
            f"log-probabilities {each.gap:.2g} apart in transformers; "
            f"strobe's of both within {each.logprob_error:.2g}",
        ]
        for each in found.differences
    ]
    lines += [
        ["strobe", f"{found.strobe_tokens_per_s:.1f} tok/s"],
        ["transformers", f"{found.transformers_tokens_per_s:.1f} tok/s ({ratio:.2f} times)"],
    ]
    console.write_table(["", ""], lines)
