"""Flags that several verbs share, so that each has one spelling and one help text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]

_MODEL, _ENGINE, _SAMPLING = "Model", "Engine", "Sampling"
"""Groups of flags in `--help`."""

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="A folder, a llama2.c file or a hub name.",
        show_default="the bundled model",
        rich_help_panel=_MODEL,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        help="auto, cpu, cuda or cuda:N.",
        show_default="STROBE_DEVICE, else auto",
        rich_help_panel=_MODEL,
    ),
]
Dtype = Annotated[
    str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.", rich_help_panel=_MODEL)
]
Kernel = Annotated[
    str | None,
    typer.Option(
        "--kernel",
        help="Attention kernel.",
        show_default="STROBE_KERNEL, else auto",
        rich_help_panel=_ENGINE,
    ),
]
Linear = Annotated[
    str | None,
    typer.Option(
        "--linear",
        help="Matmul kernel; of several by comma, the first that fits.",
        show_default="STROBE_LINEAR, else auto",
        rich_help_panel=_ENGINE,
    ),
]
KvCacheGib = Annotated[
    float | None,
    typer.Option(
        "--kv-cache-gib",
        help="Memory of the KV cache in GiB.",
        show_default="what fits; 0.5 on a CPU",
        rich_help_panel=_ENGINE,
    ),
]
GpuMemoryFraction = Annotated[
    float | None,
    typer.Option(
        "--gpu-memory-fraction",
        help="Share of the GPU's memory to take in all.",
        show_default="what is free, less a part",
        rich_help_panel=_ENGINE,
    ),
]
Overlap = Annotated[
    bool | None,
    typer.Option(
        "--overlap/--no-overlap",
        help="Launch a step before the one ahead is read.",
        show_default="overlap on a GPU",
        rich_help_panel=_ENGINE,
    ),
]
Graphs = Annotated[
    bool | None,
    typer.Option(
        "--graphs/--eager",
        help="Decode by CUDA graphs, on a GPU.",
        show_default="graphs",
        rich_help_panel=_ENGINE,
    ),
]
Deterministic = Annotated[
    bool,
    typer.Option(
        "--deterministic",
        help="The same bits for a prompt, whatever is served beside it.",
        rich_help_panel=_ENGINE,
    ),
]

MaxTokens = Annotated[
    int | None,
    typer.Option(
        "--max-tokens",
        "-n",
        help="Most tokens to write.",
        show_default="256; chat 512",
        rich_help_panel=_SAMPLING,
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option(
        "--temperature",
        "-t",
        help="0 takes the likeliest token each time.",
        show_default="the model's",
        rich_help_panel=_SAMPLING,
    ),
]
TopK = Annotated[
    int | None,
    typer.Option(
        "--top-k",
        help="Draw among the K likeliest tokens; 0 for all.",
        show_default="the model's",
        rich_help_panel=_SAMPLING,
    ),
]
TopP = Annotated[
    float | None,
    typer.Option(
        "--top-p",
        help="Draw among the fewest tokens whose probabilities sum to P.",
        show_default="the model's",
        rich_help_panel=_SAMPLING,
    ),
]
MinP = Annotated[
    float | None,
    typer.Option(
        "--min-p",
        help="Leave out tokens below this share of the likeliest one's probability.",
        show_default="the model's",
        rich_help_panel=_SAMPLING,
    ),
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(
        "--repetition-penalty",
        help="Over 1 makes used tokens less likely.",
        show_default="the model's",
        rich_help_panel=_SAMPLING,
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        "--seed", help="The same seed draws the same tokens.", show_default=False, rich_help_panel=_SAMPLING
    ),
]
Stop = Annotated[
    list[str] | None,
    typer.Option(
        "--stop", help="End before this text; may be given several times.", rich_help_panel=_SAMPLING
    ),
]
PromptFile = Annotated[
    Path | None, typer.Option("--prompts", help="A file of prompts, one a line; `-` for stdin.")
]

Plot = Annotated[Path | None, typer.Option(help="Write a figure here (.png, .svg, .pdf).")]
Save = Annotated[
    Path | None, typer.Option(help="Write the result file here; `auto` for benchmarks/results/<machine>/.")
]
Commit = Annotated[str | None, typer.Option(help="The sources' commit, where they have no git folder.")]
