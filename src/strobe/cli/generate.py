"""`strobe generate`: text from a prompt, streamed; or from a file of prompts, all at once."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from strobe.cli import console, options
from strobe.cli.load import fit, load, sampling
from strobe.errors import RequestError

if TYPE_CHECKING:
    from strobe.engine import LLM, RequestOutput, SamplingParams
    from strobe.engine.request import Metrics


_MOST_CHARACTERS = 64 << 20
"""Read of a file of prompts, or of stdin, which may have no end."""


def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="The text to go on from.", show_default="stdin")
    ] = None,
    prompts: options.PromptFile = None,
    model: options.Model = None,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    kernel: options.Kernel = None,
    linear: options.Linear = None,
    kv_cache_gib: options.KvCacheGib = None,
    gpu_memory_fraction: options.GpuMemoryFraction = None,
    overlap: options.Overlap = None,
    graphs: options.Graphs = None,
    deterministic: options.Deterministic = False,
    echo: Annotated[bool, typer.Option("--echo", help="Write the prompt before the text.")] = False,
    json: options.Json = False,
) -> None:
    """Write text that goes on from a prompt.

    The text goes to stdout as it is written; a line of timings goes to stderr.
    """
    wanted = sampling(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop,
    )
    if prompt is not None and prompts is not None:
        raise RequestError("a prompt and --prompts are both given", hint="give one of them")
    if echo and (json or prompts):
        raise RequestError("--echo with --json or --prompts, which write the prompt in any case")
    texts = _read_prompts(prompts) if prompts else [_read_prompt(prompt)]
    with load(
        model,
        device=device,
        dtype=dtype,
        kernel=kernel,
        linear=linear,
        kv_cache_gib=kv_cache_gib,
        gpu_memory_fraction=gpu_memory_fraction,
        overlap=overlap,
        graphs=graphs,
        deterministic=deterministic,
    ) as llm:
        params = fit(llm, wanted, max_tokens=256)
        if prompts:
            _write_many(llm, texts, params, json)
        elif json:
            (output,) = llm.generate(texts, params)
            console.write_json(_record(texts[0], output))
        else:
            _stream(llm, texts[0], params, echo)


def timings(metrics: Metrics) -> str:
    """One request's timings as a line for people."""
    prompt = f"{metrics.prompt_tokens} prompt token{'s' if metrics.prompt_tokens != 1 else ''}"
    parts = [prompt, f"first token {1e3 * metrics.ttft_s:.1f} ms"]
    if metrics.tpot_s:
        parts += [f"then {1e3 * metrics.tpot_s:.2f} ms a token", f"{1 / metrics.tpot_s:.1f} tok/s"]
    return ", ".join([*parts, f"{metrics.output_tokens} tokens written"])


def _read_prompt(prompt: str | None) -> str:
    if prompt is None:
        if sys.stdin.isatty():
            raise RequestError("no prompt", hint='strobe generate "Once upon a time", or pipe one in')
        prompt = _read_stdin().removesuffix("\n")
    return prompt


def _read_prompts(path: Path) -> list[str]:
    """The file's lines that are not blank."""
    text = _read_stdin() if str(path) == "-" else _read_file(path)
    prompts = [line for line in text.split("\n") if line.strip()]  # splitlines() would cut at U+2028 too
    if not prompts:
        raise RequestError(f"{path} holds no prompt", hint="one prompt a line")
    return prompts


def _read_stdin() -> str:
    try:
        return _bounded("stdin", sys.stdin)
    except UnicodeDecodeError as error:
        raise RequestError(f"stdin is not {error.encoding} text: byte {error.start}") from None


def _read_file(path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            return _bounded(str(path), file)
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 text: byte {error.start}") from None


def _bounded(name: str, file: TextIO) -> str:
    text = file.read(_MOST_CHARACTERS + 1)
    if len(text) > _MOST_CHARACTERS:
        raise RequestError(f"{name} holds more than {_MOST_CHARACTERS:,} characters")
    return text


def _stream(llm: LLM, prompt: str, params: SamplingParams, echo: bool) -> None:
    metrics, begun = None, echo
    chunks = llm.stream(prompt, params)
    try:
        if echo:
            console.write(prompt)
        for chunk in chunks:
            begun = True
            console.write(chunk.text)
            metrics = chunk.metrics or metrics
    finally:
        if begun:
            console.write("\n")
    if metrics is not None:
        console.note(timings(metrics))


def _write_many(llm: LLM, prompts: list[str], params: SamplingParams, json: bool) -> None:
    """Each prompt's output in the prompts' order: a JSON object a line, or the prompt and its text."""
    bar, task = console.progress(len(prompts), "prompts")
    with bar:
        outputs = llm.generate(prompts, params, on_finish=lambda _: bar.advance(task))
    for prompt, output in zip(prompts, outputs, strict=True):
        if json:
            console.write_json(_record(prompt, output), indent=None)
        else:
            console.write(f"{prompt}{output.text}\n\n")


def _record(prompt: str, output: RequestOutput) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "text": output.text,
        "token_ids": output.token_ids,
        "finish_reason": output.finish_reason,
        "metrics": asdict(output.metrics),
    }
