"""`strobe chat`: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from strobe.cli import console, options
from strobe.cli.generate import timings
from strobe.cli.load import fit, load, sampling
from strobe.errors import RequestError, StrobeError, did_you_mean

if TYPE_CHECKING:
    from strobe.engine import LLM, SamplingParams
    from strobe.engine.request import Metrics

HELP = """/reset         forget what was said
/save FILE     write the conversation as JSON
/help          this list
/exit          leave (Ctrl-D too)
Ctrl-C stops an answer and keeps the conversation."""


def chat(
    model: options.Model = None,
    system: Annotated[
        str | None, typer.Option(help="What the model is told before all else.", show_default=False)
    ] = None,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    seed: options.Seed = None,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    kernel: options.Kernel = None,
    linear: options.Linear = None,
    kv_cache_gib: options.KvCacheGib = None,
    gpu_memory_fraction: options.GpuMemoryFraction = None,
    overlap: options.Overlap = None,
    graphs: options.Graphs = None,
) -> None:
    """Talk with a model. /reset, /save FILE, /help and /exit are commands; Ctrl-C stops an answer."""
    wanted = sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
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
    ) as llm:
        if llm.tokenizer.chat_template is None:
            raise RequestError(
                f"{llm.name} brings no chat template", hint="`strobe generate` takes plain prompts"
            )
        Chat(llm, fit(llm, wanted, max_tokens=512), system).loop()


class Chat:
    """A conversation: its messages, and the model that answers."""

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None) -> None:
        self.llm = llm
        self.params = params
        self.opening = [{"role": "system", "content": system}] if system else []
        self.messages = list(self.opening)

    def loop(self) -> None:
        """Read and answer until the input ends."""
        if sys.stdin.isatty():
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  (gives input() its line editing and history)
            # a shell's background jobs, and what they start, ignore Ctrl-C
            signal.signal(signal.SIGINT, signal.default_int_handler)
            console.note("/help lists the commands, Ctrl-D leaves")
        while True:
            try:
                line = input("> " if sys.stdin.isatty() else "").strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                console.note("\nCtrl-D leaves")
                continue
            except UnicodeDecodeError as error:
                console.error(f"the line is not {error.encoding} text")
                continue
            if line in ("/exit", "/quit"):
                return
            if line.startswith("/"):
                self.command(line)
            elif line:
                self.answer(line)

    def command(self, line: str) -> None:
        """Obey a line that begins with a slash; a mistake in it is told and the chat goes on."""
        name, _, rest = line.partition(" ")
        if name == "/reset":
            self.messages = list(self.opening)
            console.note("the conversation starts anew")
        elif name == "/help":
            console.note(HELP)
        elif name == "/save" and rest.strip():
            self.save(rest.strip())
        elif name == "/save":
            console.error("/save needs a file: /save chat.json")
        else:
            hint = did_you_mean(name, ["/reset", "/save", "/help", "/exit"])
            console.error(f"unknown command {name}" + (f" (hint: {hint})" if hint else " (hint: /help)"))

    def answer(self, text: str) -> None:
        """Stream the model's answer. One that is stopped stays in the conversation as far as it got."""
        messages = [*self.messages, {"role": "user", "content": text}]
        said: list[str] = []
        metrics: Metrics | None = None
        try:
            with contextlib.closing(self.llm.stream_chat(messages, self.params)) as chunks:
                for chunk in chunks:
                    said.append(chunk.text)
                    console.write(chunk.text)
                    metrics = chunk.metrics or metrics
        except KeyboardInterrupt:
            pass
        except StrobeError as error:
            console.error(str(error))
            return
        console.write("\n")
        if metrics is not None:
            console.note(timings(metrics))
        self.messages = [*messages, {"role": "assistant", "content": "".join(said)}]

    def save(self, file_name: str) -> None:
        """Write the messages; an existing file is left as it is."""
        path = Path(os.path.expanduser(file_name))
        try:
            with path.open("x", encoding="utf-8") as file:
                json.dump(self.messages, file, indent=2, ensure_ascii=False)
                file.write("\n")
        except (OSError, ValueError) as error:
            console.error(f"{path}: {getattr(error, 'strerror', None) or error}")
        else:
            console.note(f"{len(self.messages)} messages saved to {path}")
