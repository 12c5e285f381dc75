"""Flags that several verbs share, so that each has one spelling and one help text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]

Model = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", help="A folder, a llama2.c file or a hub name.", show_default="the bundled model"
    ),
]
Device = Annotated[
    str | None,
    typer.Option("--device", help="auto, cpu, cuda or cuda:N.", show_default="STROBE_DEVICE, else auto"),
]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
Kernel = Annotated[
    str | None, typer.Option("--kernel", help="Attention kernel.", show_default="STROBE_KERNEL, else auto")
]
Linear = Annotated[
    str | None,
    typer.Option(
        "--linear",
        help="Matmul kernel; of several by comma, the first that fits.",
        show_default="STROBE_LINEAR, else auto",
    ),
]
KvCacheGib = Annotated[
    float | None, typer.Option("--kv-cache-gib", help="Memory of the KV cache in GiB.", show_default=False)
]
GpuMemoryFraction = Annotated[
    float | None,
    typer.Option(
        "--gpu-memory-fraction",
        help="Share of the GPU's memory to take in all.",
        show_default="what is free, less a part",
    ),
]
Overlap = Annotated[
    bool | None,
    typer.Option(
        "--overlap/--no-overlap",
        help="Launch a step before the one ahead is read.",
        show_default="no-overlap",
    ),
]
Graphs = Annotated[
    bool | None,
    typer.Option("--graphs/--eager", help="Decode by CUDA graphs, on a GPU.", show_default="eager"),
]
Deterministic = Annotated[
    bool,
    typer.Option("--deterministic", help="The same bits for a prompt, whatever is served beside it."),
]

MaxTokens = Annotated[
    int | None, typer.Option("--max-tokens", "-n", help="Most tokens to write.", show_default="256; chat 512")
]
Temperature = Annotated[
    float | None,
    typer.Option(
        "--temperature", "-t", help="0 takes the likeliest token each time.", show_default="the model's"
    ),
]
TopK = Annotated[
    int | None,
    typer.Option("--top-k", help="Draw among the K likeliest tokens; 0 for all.", show_default="the model's"),
]
TopP = Annotated[
    float | None,
    typer.Option(
        "--top-p",
        help="Draw among the fewest tokens whose probabilities sum to P.",
        show_default="the model's",
    ),
]
MinP = Annotated[
    float | None,
    typer.Option(
        "--min-p",
        help="Leave out tokens below this share of the likeliest one's probability.",
        show_default="the model's",
    ),
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(
        "--repetition-penalty", help="Over 1 makes used tokens less likely.", show_default="the model's"
    ),
]
Seed = Annotated[
    int | None, typer.Option("--seed", help="The same seed draws the same tokens.", show_default=False)
]
Stop = Annotated[
    list[str] | None, typer.Option("--stop", help="End before this text; may be given several times.")
]
PromptFile = Annotated[
    Path | None, typer.Option("--prompts", help="A file of prompts, one a line; `-` for stdin.")
]

Plot = Annotated[Path | None, typer.Option(help="Write a figure here (.png, .svg, .pdf).")]
Save = Annotated[
    Path | None, typer.Option(help="Write the result file here; `auto` for benchmarks/results/<machine>/.")
]
Commit = Annotated[str | None, typer.Option(help="The sources' commit, where they have no git folder.")]
