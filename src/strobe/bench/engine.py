"""Times the engine and its peers: one request's latency, many requests' throughput; checked first."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from strobe.bench.ceilings import ceilings
from strobe.bench.engine_peers import Generation, Strobe, Transformers
from strobe.bench.results import Row
from strobe.errors import StrobeError
from strobe.models.network import Model, tensors

if TYPE_CHECKING:
    from strobe.engine import LLM

TIE = 1e-3
"""Logits closer than this, relative to the largest, may come out in either order."""
MOST_REQUESTS = 100_000


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

    def draw(self, vocab_size: int) -> tuple[list[list[int]], list[int]]:
        """Random token ids for every prompt, and every output's length."""
        rng = random.Random(self.seed)  # noqa: S311 - lengths and tokens of a benchmark
        outputs = [rng.randint(*self.output) for _ in range(self.requests)]
        lengths = [rng.randint(*self.prompt) for _ in range(self.requests)]
        return [[rng.randrange(vocab_size) for _ in range(length)] for length in lengths], outputs


def latency(
    llm: LLM, peer: Transformers | None = None, *, prompt: int = 128, output: int = 128, runs: int = 5
) -> list[Row]:
    """One request at a time: time to first token, and between tokens. strobe and the peer take turns."""
    load = Load(1, (prompt, prompt), (output, output))
    (tokens,), _ = load.draw(llm.engine.model.config.vocab_size)
    strobe = Strobe(llm)
    checked = (
        None if peer is None else agree(peer, tokens, strobe.one(tokens, output), peer.one(tokens, output))
    )
    contenders: list[Strobe | Transformers] = [strobe] if peer is None else [strobe, peer]
    taken: list[list[Generation]] = [[] for _ in contenders]
    for _ in range(runs):
        for engine, done in zip(contenders, taken, strict=True):
            done.append(engine.one(tokens, output))
    case = {"model": llm.name, "batch": 1, "prompt": prompt, "output": output, "dtype": _dtype(llm)}
    return [
        {"case": case, "provider": engine.name, "checked": checked} | latency_figures(llm.engine.model, done)
        for engine, done in zip(contenders, taken, strict=True)
    ]


def throughput(
    llm: LLM,
    peer: Transformers | None = None,
    load: Load | None = None,
    *,
    runs: int = 3,
    batches: Sequence[int] = (4, 8, 16, 32),
) -> list[Row]:
    """All requests at once: output tokens a second. Of the peer's batch sizes the fastest is kept."""
    load = load or Load()
    prompts, outputs = load.draw(llm.engine.model.config.vocab_size)
    strobe = Strobe(llm)
    answers = strobe.many(prompts, outputs)
    checked = None
    tries: dict[int, list[float]] = {}
    if peer is not None:
        alone = peer.many(prompts, outputs, 1)
        checked = all(
            agree(peer, prompt, Generation(ours, ()), Generation(theirs, ()))
            for prompt, ours, theirs in zip(prompts, answers, alone, strict=True)
        )
        tries = {batch: [] for batch in batches if batch <= load.requests} or {load.requests: []}
    ours_s: list[float] = []
    for _ in range(runs):
        ours_s.append(_seconds(lambda: strobe.many(prompts, outputs)))
        for batch, seconds in tries.items():
            seconds.append(_seconds(lambda batch=batch: peer.many(prompts, outputs, batch)))  # type: ignore[misc, union-attr]
    case = {
        "model": llm.name,
        "requests": load.requests,
        "prompt": list(load.prompt),
        "output": list(load.output),
        "dtype": _dtype(llm),
    }
    total = sum(outputs)
    rows: list[Row] = [
        {"case": case, "provider": strobe.name, "checked": checked} | _throughput(total, ours_s)
    ]
    if peer is not None:
        best = min(tries, key=lambda batch: statistics.median(tries[batch]))
        figures = _throughput(total, tries[best])
        rows.append({"case": case, "provider": peer.name, "checked": checked, "best_batch": best} | figures)
    return rows


def agree(peer: Transformers, prompt: Sequence[int], ours: Generation, theirs: Generation) -> bool:
    """True where the greedy tokens are the same up to where the peer's own logits tie."""
    for at, (a, b) in enumerate(zip(ours.token_ids, theirs.token_ids, strict=True)):
        if a != b:
            logits = peer.logits([*prompt, *ours.token_ids[:at]])
            return bool((logits[a] - logits[b]).abs() <= TIE * logits.abs().max())
    return True


def latency_figures(model: Model, done: Sequence[Generation]) -> dict[str, Any]:
    """What several runs of one request on `model` say: times to the first token and between tokens, rates."""
    gaps = sorted(1e3 * (b - a) for run in done for a, b in zip(run.at_s, run.at_s[1:], strict=False))
    firsts = sorted(1e3 * run.at_s[0] for run in done)
    figures: dict[str, Any] = {
        "ttft_ms": statistics.median(firsts),
        "ttft_ms_min": firsts[0],
        "ttft_ms_max": firsts[-1],
        "runs": len(done),
    }
    if not gaps:
        return figures
    # a run's mean gap, so that what an engine does between bursts of tokens counts; then the middle run
    means = sorted(1e3 * (run.at_s[-1] - run.at_s[0]) / (len(run.at_s) - 1) for run in done)
    figures |= {
        "tpot_ms": statistics.median(means),
        "tpot_ms_min": means[0],
        "tpot_ms_max": means[-1],
        "tpot_ms_p50": _percentile(gaps, 50),
        "tpot_ms_p99": _percentile(gaps, 99),
        "tok_s": 1e3 / statistics.median(means),
    }
    weight_bytes = sum(t.numel() * t.element_size() for t in tensors(model.weights))
    figures["gbps"] = weight_bytes / figures["tpot_ms"] * 1e-6
    if model.device.type == "cuda":
        roof = ceilings("cuda", str(model.dtype).removeprefix("torch.")).read_gbps
        figures["floor_percent"] = 100 * figures["gbps"] / roof
    return figures


def _throughput(tokens: int, seconds: Sequence[float]) -> dict[str, Any]:
    return {
        "output_tokens": tokens,
        "s": statistics.median(seconds),
        "s_min": min(seconds),
        "s_max": max(seconds),
        "tok_s": tokens / statistics.median(seconds),
        "runs": len(seconds),
    }


def _percentile(ordered: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile of ascending values."""
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _dtype(llm: LLM) -> str:
    return str(llm.engine.model.dtype).removeprefix("torch.")
