"""What the engine is measured on: a batch of equal requests, or a load of mixed ones.

Both are measured from outside, by whole runs, so that every engine is measured alike.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from strobe.bench import floor
from strobe.bench.ceilings import Ceilings
from strobe.errors import StrobeError
from strobe.models.config import ModelConfig

MOST_REQUESTS = 100_000


@dataclass(frozen=True)
class Job:
    """Prompts of random token ids to serve together; request i writes exactly `outputs[i]` tokens."""

    prompts: tuple[tuple[int, ...], ...]
    outputs: tuple[int, ...]
    runs: int = 1


@dataclass(frozen=True)
class Network:
    """What a case's figures are computed from; without a `roof` they hold no share of the floor."""

    config: ModelConfig
    dtype: torch.dtype
    roof: Ceilings | None = None


@dataclass(frozen=True)
class Batch:
    """`batch` requests of one length, together."""

    batch: int = 1
    prompt: int = 128
    output: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.batch, self.prompt) < 1 or self.output < 2 or self.batch > MOST_REQUESTS:
            given = f"batch {self.batch}, prompt {self.prompt}, output {self.output}"
            known = f"batch from 1 to {MOST_REQUESTS}, prompt from 1, output from 2"
            raise StrobeError(f"{given}; supported: {known}")

    @property
    def longest(self) -> int:
        return self.prompt + self.output

    def sizes(self) -> dict[str, Any]:
        return {"batch": self.batch, "prompt": self.prompt, "output": self.output}

    def jobs(self, vocab_size: int, runs: int) -> list[Job]:
        """A run of one token each, and the whole one."""
        prompts, _ = Load(self.batch, (self.prompt, self.prompt), (self.output, self.output), self.seed).draw(
            vocab_size
        )
        ids = tuple(map(tuple, prompts))
        return [Job(ids, (1,) * self.batch, runs), Job(ids, (self.output,) * self.batch, runs)]

    def figures(self, taken: Sequence[Sequence[float]], network: Network) -> dict[str, Any]:
        """`ttft_ms` is the one-token run; `tpot_ms` what each further token adds to it, in the middle run."""
        first, whole = (statistics.median(seconds) for seconds in taken)
        steps = self.output - 1
        tpot_s = max(whole - first, 1e-9) / steps
        moved = floor.decode_bytes(network.config, network.dtype, self.batch, self.prompt, self.output)
        found = {
            "ttft_ms": 1e3 * first,
            "ttft_ms_min": 1e3 * min(taken[0]),
            "ttft_ms_max": 1e3 * max(taken[0]),
            "tpot_ms": 1e3 * tpot_s,
            "tpot_ms_min": 1e3 * max(min(taken[1]) - first, 1e-9) / steps,
            "tpot_ms_max": 1e3 * max(max(taken[1]) - first, 1e-9) / steps,
            "tok_s": self.batch / tpot_s,
            "gbps": moved / tpot_s * 1e-9,
            "runs": len(taken[1]),
        }
        if network.roof is not None:
            found["floor_percent"] = 100 * found["gbps"] / network.roof.read_gbps
        return found


@dataclass(frozen=True)
class Load:
    """Requests to serve: `prompt` and `output` are the shortest and longest length, drawn evenly between."""

    requests: int = 32
    prompt: tuple[int, int] = (16, 256)
    output: tuple[int, int] = (16, 256)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("prompt", "output"):
            low, high = getattr(self, name)
            if not 1 <= low <= high:
                raise StrobeError(f"{name} lengths {low} to {high}; supported: 1 and up, the shortest first")
        if not 1 <= self.requests <= MOST_REQUESTS:
            raise StrobeError(f"requests is {self.requests}; supported: 1 to {MOST_REQUESTS}")

    @property
    def longest(self) -> int:
        return self.prompt[1] + self.output[1]

    def draw(self, vocab_size: int) -> tuple[list[list[int]], list[int]]:
        """Random token ids for every prompt, and every output's length."""
        rng = random.Random(self.seed)  # noqa: S311 - lengths and tokens of a benchmark
        outputs = [rng.randint(*self.output) for _ in range(self.requests)]
        lengths = [rng.randint(*self.prompt) for _ in range(self.requests)]
        return [[rng.randrange(vocab_size) for _ in range(length)] for length in lengths], outputs

    def sizes(self) -> dict[str, Any]:
        return {"requests": self.requests, "prompt": list(self.prompt), "output": list(self.output)}

    def jobs(self, vocab_size: int, runs: int) -> list[Job]:
        prompts, outputs = self.draw(vocab_size)
        return [Job(tuple(map(tuple, prompts)), tuple(outputs), runs)]

    def figures(self, taken: Sequence[Sequence[float]], network: Network) -> dict[str, Any]:
        (seconds,) = taken
        (job,) = self.jobs(network.config.vocab_size, 1)
        found = throughput_figures(sum(job.outputs), seconds)
        lengths = list(map(len, job.prompts))
        moved = floor.load_bytes(network.config, network.dtype, lengths, job.outputs)
        found["gbps"] = moved / found["s"] * 1e-9
        if network.roof is not None:
            least = floor.load_seconds(network.config, network.dtype, lengths, job.outputs, network.roof)
            found["floor_percent"] = 100 * least / found["s"]
        return found


Case = Batch | Load


def throughput_figures(tokens: int, seconds: Sequence[float]) -> dict[str, Any]:
    middle = statistics.median(seconds)
    return {
        "output_tokens": tokens,
        "s": middle,
        "s_min": min(seconds),
        "s_max": max(seconds),
        "tok_s": tokens / middle,
        "runs": len(seconds),
    }
