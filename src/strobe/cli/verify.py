"""`strobe verify`: the same weights through strobe and transformers."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from strobe.cli import console, options
from strobe.cli.load import load

FLOAT32_TOLERANCE = 1e-3


def verify(
    model: Annotated[
        str | None,
        typer.Argument(help="A Hugging Face folder or hub name.", show_default="the bundled model"),
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", help="Greedy tokens of each prompt.")] = 64,
    device: options.Device = None,
    dtype: options.Dtype = "float32",
    kernel: options.Kernel = None,
    linear: options.Linear = None,
    json: options.Json = False,
) -> None:
    """Run the same weights through strobe and transformers: logits, greedy tokens, speeds.

    In float32 the exit code is 1 where any logit differs by more than 0.001 times the largest one.
    """
    from strobe.bench.verify import verify as compare

    with load(model, device=device, dtype=dtype, kernel=kernel, linear=linear) as llm:
        found = compare(llm, max_tokens)
    if json:
        console.write_json(asdict(found))
    else:
        ratio = found.strobe_tokens_per_s / found.transformers_tokens_per_s
        console.write_table(
            ["", ""],
            [
                ["model", f"{found.model}, {found.dtype} on {found.device}"],
                [
                    "largest logit difference",
                    f"{found.logit_difference:.2e} (largest logit {found.largest_logit:.3g})",
                ],
                ["same likeliest token", f"at {found.same_choice} of {found.positions} positions"],
                ["greedy tokens equal", f"{found.greedy_equal} of {found.greedy_tokens}"],
                ["strobe", f"{found.strobe_tokens_per_s:.1f} tok/s"],
                ["transformers", f"{found.transformers_tokens_per_s:.1f} tok/s ({ratio:.2f} times)"],
            ],
        )
    if found.dtype == "float32" and found.logit_difference > FLOAT32_TOLERANCE * max(
        1.0, found.largest_logit
    ):
        raise typer.Exit(1)
