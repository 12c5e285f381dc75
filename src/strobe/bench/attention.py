"""Times attention kernels and their peers over shapes: checked first, then timed, in one run."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from strobe.attention import ladder
from strobe.attention.cases import Case, Inputs
from strobe.attention.check import Answers
from strobe.attention.problem import AttentionProblem, Paged
from strobe.bench.decode import FLOAT8, Float8Case
from strobe.bench.peers import Peer
from strobe.bench.results import Row
from strobe.bench.timer import Clock, GraphClock, Timing, clock, in_turns
from strobe.cuda import jit
from strobe.errors import KernelRefusedError, ProblemError, UnknownNameError

_log = logging.getLogger(__name__)
_DTYPES = ("float32", "bfloat16", "float16")
_CACHES_BYTES = 192 << 20
"""Replays rotate among input sets that together outgrow any L2 cache."""
_LARGE_BYTES = 2 << 30
"""Of a set this large, what the L2 cache keeps of the call before is nothing."""
_PARTS = ("inputs and oracle", "first calls", "captures", "timing")
_SETTLED = "bench: the same layout, settled"


@dataclass(frozen=True)
class Provider:
    """A rung ("strobe:name") or a peer: what it refuses, and how to call it on given inputs.

    `source` names what is compiled for a problem, where that is known ahead.
    """

    name: str
    refusals: Callable[[AttentionProblem], list[str]]
    bind: Callable[[Inputs], Callable[[], torch.Tensor]]
    source: Callable[[AttentionProblem], jit.Source] | None = None

    @property
    def is_rung(self) -> bool:
        return self.name.startswith("strobe:")


def of_rung(
    rung: ladder.Rung, tile_sizes: Mapping[str, int] | None = None, *, settled: bool = False
) -> Provider:
    """A rung, with other tile sizes than its own where it has them as parameters.

    `settled` times it as the engine runs it: the layout allows that it starts beside the kernel ahead.

    Raises:
        KernelRefusedError: the rung has no tile sizes to set, or none of these names.
    """
    tile = None if tile_sizes is None else _tile(rung, tile_sizes)

    def laid_out(problem: AttentionProblem) -> AttentionProblem:
        if not (settled and isinstance(problem.layout, Paged)):
            return problem
        layout = problem.layout.scratch.setdefault(_SETTLED, replace(problem.layout, settled=True))
        return replace(problem, layout=layout)

    def bind(inputs: Inputs) -> Callable[[], torch.Tensor]:
        q, k, v, problem = inputs.q, inputs.k, inputs.v, laid_out(inputs.problem)
        out = torch.full_like(q, float("nan"))
        run = partial(rung.module.run, problem, tile=tile) if tile else rung.prepare(problem, q, k, v)

        def call() -> torch.Tensor:
            run(q, k, v, out, None)
            return out

        return call

    def refusals(problem: AttentionProblem) -> list[str]:
        if settled and not problem.paged:
            return ["settled layouts are paged"]
        reasons = rung.refusals(problem)
        return reasons if tile is None else [*reasons, *rung.module.refusals_for_tile(problem, tile)]

    def source(problem: AttentionProblem) -> jit.Source:
        return rung.module.source(rung.module.choose_shape(laid_out(problem)))

    name = f"strobe:{rung.name}{' settled' if settled else ''}"
    return Provider(name, refusals, bind, source if hasattr(rung.module, "source") else None)


def tile_names(rung: ladder.Rung) -> list[str]:
    """The tile sizes that a rung takes, by name."""
    kind = getattr(rung.module, "Tile", None)
    return [] if kind is None else [field.name for field in fields(kind)]


def _tile(rung: ladder.Rung, sizes: Mapping[str, int]) -> Any:
    known = tile_names(rung)
    if unknown := [name for name in sizes if name not in known]:
        raise KernelRefusedError(
            f"{rung.name} has no tile size {', '.join(unknown)}; it has: {', '.join(known) or 'none'}"
        )
    return rung.module.Tile(**sizes)


def of_peer(peer: Peer) -> Provider:
    def bind(inputs: Inputs) -> Callable[[], torch.Tensor]:
        return peer.make(peer.load(), inputs)

    def refusals(problem: AttentionProblem) -> list[str]:
        return peer.refusals(problem) or [reason for reason in [peer.missing()] if reason]

    return Provider(peer.name, refusals, bind)


def measure_all(
    cases: Sequence[Case],
    providers: Sequence[Provider],
    dtype: str,
    device: str,
    *,
    strict: bool = False,
    replay: bool = False,
    budget_ms: float | None = 200.0,
) -> Iterator[Row]:
    """A row for each case and provider that does not refuse it; `strict` raises at a refusal.

    A peer that fails is told of and left out. A case's providers take turns. Prefill is timed call by call
    with the L2 cache flushed; decode, and with `replay` prefill too, by CUDA-graph replay over inputs that
    together outgrow it. Peak memory is what a call allocates beyond its inputs and its output. Without a
    budget nothing is timed.

    Raises:
        KernelRefusedError: with `strict`, the first refusal.
        ProblemError: a case without rows, or without anything to read.
    """
    for case in cases:
        marks = [time.perf_counter()]
        inputs = case.inputs(torch_dtype(dtype), device)
        if not case.rows or not inputs.problem.bytes():
            raise ProblemError(f"nothing to measure ({inputs.problem}); supported: rows and lengths from 1")
        answers = Answers.of(inputs.problem, inputs.q, inputs.k, inputs.v)
        marks.append(time.perf_counter())
        if inputs.problem.device == "cuda":
            _compile(providers, inputs.problem)
        rows, clocks = [], []
        for provider in providers:
            if reasons := provider.refusals(inputs.problem):
                if strict:
                    raise KernelRefusedError(
                        f"{provider.name} refuses ({inputs.problem}): {'; '.join(reasons)}"
                    )
                continue
            start = time.perf_counter()
            try:
                row = _checked(case, dtype, provider, inputs, answers)
            except Exception as error:
                if provider.is_rung:
                    raise
                _log.warning("%s: %s failed and is left out: %s", case, provider.name, error)
                continue
            _log.info("%s: %s checked in %.1f s", case, provider.name, time.perf_counter() - start)
            rows.append(row)
            if row["checked"] and budget_ms:  # a wrong answer has no speed
                clocks.append((row, provider))
        marks.append(time.perf_counter())
        replayed = inputs.problem.device == "cuda" and (replay or inputs.problem.phase == "decode")
        sets = [inputs, *(_more_inputs(inputs) if replayed else [])]
        turns = [_clock(provider, sets, replayed) for _, provider in clocks]
        marks.append(time.perf_counter())
        timings = in_turns(turns, budget_ms=budget_ms or 0.0)
        marks.append(time.perf_counter())
        for (row, _), timing in zip(clocks, timings, strict=True):
            row |= _figures(inputs.problem, timing)
        spent = [
            f"{end - start:.1f} s {what}" for (start, end), what in zip(pairwise(marks), _PARTS, strict=True)
        ]
        _log.info("%s: %s", case, ", ".join(spent))
        yield from rows


def _compile(providers: Sequence[Provider], problem: AttentionProblem) -> None:
    """Side by side; at their first calls they would be compiled one after the other."""
    found = [each.source(problem) for each in providers if each.source and not each.refusals(problem)]
    jit.warm(found, jit.arch_of())


def _checked(case: Case, dtype: str, provider: Provider, inputs: Inputs, answers: Answers) -> Row:
    out, peak = _peak_bytes(provider.bind(inputs), inputs)
    found = answers.verdict(out)
    return {
        "case": described(case, dtype),
        "provider": provider.name,
        "checked": found.right,
        "error": found.error,
        "error_allowed": found.allowed,
        "peak_bytes": peak,
    }


def _figures(problem: AttentionProblem, timing: Timing) -> Row:
    return {
        "ms": timing.ms,
        "ms_min": timing.ms_min,
        "ms_max": timing.ms_max,
        "tflops": problem.flops() / timing.ms * 1e-9,
        "gbps": problem.bytes() / timing.ms * 1e-6,
        "intensity": problem.flops() / problem.bytes(),
    }


def _more_inputs(inputs: Inputs) -> list[Inputs]:
    """What replays rotate among, besides `inputs`: the same in other memory, but for the layout, which all
    layers of a model share, and with it what a rung keeps there."""
    moved = max(inputs.problem.bytes(), 1)
    sets = -(-_CACHES_BYTES // moved) if moved < _CACHES_BYTES else 1 + (moved < _LARGE_BYTES)
    return [
        Inputs(inputs.q.clone(), inputs.k.clone(), inputs.v.clone(), inputs.options)
        for _ in range(1, min(sets, 24))
    ]


def _clock(provider: Provider, sets: Sequence[Inputs], replayed: bool) -> Clock:
    if replayed:
        return GraphClock([provider.bind(inputs) for inputs in sets])
    return clock(provider.bind(sets[0]), sets[0].problem.device)


def _peak_bytes(call: Callable[[], torch.Tensor], inputs: Inputs) -> tuple[torch.Tensor, int | None]:
    """The call's output, and the device memory it allocated at most; None on a CPU, where nobody counts."""
    if inputs.problem.device != "cuda":
        return call(), None
    first = call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    allocates_output = out is not first  # as peers do; a rung is handed one
    return out, peak - (out.nbytes if allocates_output else 0)


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of this name. Raises UnknownNameError for one that is not measured."""
    if name not in _DTYPES:
        raise UnknownNameError.among("dtype", name, _DTYPES)
    return getattr(torch, name)


def described(case: Case, dtype: str) -> dict[str, Any]:
    """A case as result files name it: shape by its longest row, mask and layout where not plain."""
    named: dict[str, Any] = {
        "batch": len(case.rows),
        "q_len": max(q for q, _ in case.rows),
        "kv_len": max(kv for _, kv in case.rows),
        "q_heads": case.q_heads,
        "kv_heads": case.kv_heads,
        "head_dim": case.head_dim,
        "causal": case.causal,
        "dtype": dtype,
    }
    lengths = [kv for _, kv in case.rows]
    if len(set(lengths)) > 1:
        named |= {"kv_len_min": min(lengths), "kv_tokens": sum(lengths)}
    if case.layout != "dense":
        named |= {"layout": case.layout}
    if isinstance(case, Float8Case):
        named |= {"kv_dtype": FLOAT8}
    if case.layout.startswith("paged"):
        named |= {"page_size": case.page_size}
    if case.window != (-1, -1):
        named |= {"window": list(case.window)}
    return named
