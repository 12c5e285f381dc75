"""Times the engine and its peers: one request's latency, many requests' throughput; checked first."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from strobe.bench import floor
from strobe.bench.answers import TIE, first_wrong, tolerance
from strobe.bench.ceilings import ceilings
from strobe.bench.engine_cases import Load, throughput_figures
from strobe.bench.engine_peers import Generation, Strobe, Transformers
from strobe.bench.results import Row
from strobe.bench.subject import Subject
from strobe.models.network import Model


def latency(
    subject: Subject,
    peer: Transformers | None = None,
    *,
    prompt: int = 128,
    output: int = 128,
    runs: int = 5,
) -> list[Row]:
    """One request at a time: time to first token, and between tokens. strobe and the peer take turns.

    `checked`: the tokens are the peer's, or without one, those that PyTorch's own calls give.
    """
    load = Load(1, (prompt, prompt), (output, output))
    (tokens,), _ = load.draw(subject.model.config.vocab_size)
    strobe, tie = Strobe(subject), tolerance(subject.model.dtype)
    ours = strobe.one(tokens, output)
    if peer is None:
        checked = first_wrong(subject.model, tokens, ours.token_ids) is None
    else:
        checked = agree(peer, tokens, ours, peer.one(tokens, output), tie)
    contenders: list[Strobe | Transformers] = [strobe] if peer is None else [strobe, peer]
    taken: list[list[Generation]] = [[] for _ in contenders]
    for _ in range(runs):
        for engine, done in zip(contenders, taken, strict=True):
            done.append(engine.one(tokens, output))
    case = subject.case(batch=1, prompt=prompt, output=output)
    return [
        {"case": case, "provider": engine.name, "checked": checked}
        | latency_figures(subject.model, done, prompt)
        for engine, done in zip(contenders, taken, strict=True)
    ]


def throughput(
    subject: Subject,
    peer: Transformers | None = None,
    load: Load | None = None,
    *,
    runs: int = 3,
    batches: Sequence[int] = (4, 8, 16, 32),
) -> list[Row]:
    """All requests at once: output tokens a second. Of the peer's batch sizes the fastest is kept.

    `checked` is as in `latency`, over all requests; without a peer, over the first and the last.
    """
    load = load or Load()
    prompts, outputs = load.draw(subject.model.config.vocab_size)
    strobe, tie = Strobe(subject), tolerance(subject.model.dtype)
    answers = strobe.many(prompts, outputs)
    tries: dict[int, list[float]] = {}
    if peer is None:
        checked = all(first_wrong(subject.model, prompts[i], answers[i]) is None for i in (0, -1))
    else:
        alone = peer.many(prompts, outputs, 1)
        checked = all(
            agree(peer, prompt, Generation(ours, ()), Generation(theirs, ()), tie)
            for prompt, ours, theirs in zip(prompts, answers, alone, strict=True)
        )
        tries = {batch: [] for batch in batches if batch <= load.requests} or {load.requests: []}
    ours_s: list[float] = []
    for _ in range(runs):
        ours_s.append(_seconds(lambda: strobe.many(prompts, outputs)))
        if peer is not None:
            for batch, seconds in tries.items():
                seconds.append(_seconds(partial(peer.many, prompts, outputs, batch)))
    case = subject.case(**load.sizes())
    total = sum(outputs)
    rows: list[Row] = [
        {"case": case, "provider": strobe.name, "checked": checked} | throughput_figures(total, ours_s)
    ]
    if peer is not None:
        best = min(tries, key=lambda batch: statistics.median(tries[batch]))
        figures = throughput_figures(total, tries[best])
        rows.append({"case": case, "provider": peer.name, "checked": checked, "best_batch": best} | figures)
    return rows


def agree(
    peer: Transformers, prompt: Sequence[int], ours: Generation, theirs: Generation, tie: float = TIE
) -> bool:
    """True where the greedy tokens are the same up to where the peer's own logits tie."""
    for at, (a, b) in enumerate(zip(ours.token_ids, theirs.token_ids, strict=True)):
        if a != b:
            logits = peer.logits([*prompt, *ours.token_ids[:at]])
            return bool((logits[a] - logits[b]).abs() <= tie * logits.abs().max())
    return True


def latency_figures(model: Model, done: Sequence[Generation], prompt: int) -> dict[str, Any]:
    """What several runs of one request on `model` say: times to the first token and between tokens, rates.

    `gbps` counts the weights and the cache that a token's step reads; on a GPU `floor_percent` is its
    share of the machine's read ceiling.
    """
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
    output = len(done[0].at_s)
    figures["gbps"] = (
        floor.decode_bytes(model.config, model.dtype, 1, prompt, output) / figures["tpot_ms"] * 1e-6
    )
    if model.device.type == "cuda":
        roof = ceilings("cuda", str(model.dtype).removeprefix("torch.")).read_gbps
        figures["floor_percent"] = 100 * figures["gbps"] / roof
    return figures


def _percentile(ordered: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile of ascending values."""
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start
