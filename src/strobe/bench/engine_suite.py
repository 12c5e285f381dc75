"""The engine's committed results: batches and loads over published shapes, strobe beside other engines.

Every engine is given the same shapes, token ids and lengths, is measured by whole runs
(`engine_cases`), and has the machine to itself while it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

from strobe.bench import vllm
from strobe.bench.answers import first_wrong
from strobe.bench.ceilings import Ceilings
from strobe.bench.engine_cases import Batch, Case, Job, Load, Network
from strobe.bench.engine_peers import Strobe, Transformers
from strobe.bench.memory import let_go
from strobe.bench.results import Result, Row
from strobe.bench.subject import Subject
from strobe.bench.subject import subject as random_subject
from strobe.checkpoints.load import DTYPES
from strobe.engine import EngineConfig
from strobe.models import shapes

_OUTPUT = 256
STANDARD: dict[str, tuple[Case, ...]] = {
    "llama3.2-1b": (
        *(Batch(1, prompt, _OUTPUT) for prompt in (128, 1024)),
        *(Batch(batch, 128, _OUTPUT) for batch in (8, 32)),
        Load(512, (100, 1024), (100, 1024)),
    ),
    "llama2-7b": (
        *(Batch(1, prompt, _OUTPUT) for prompt in (128, 1024)),
        *(Batch(batch, 128, _OUTPUT) for batch in (8, 32)),
    ),
    "llama3-8b": (
        *(Batch(1, prompt, _OUTPUT) for prompt in (128, 1024)),
        *(Batch(batch, 128, _OUTPUT) for batch in (8, 32)),
        Load(512, (100, 1024), (100, 1024)),
    ),
}
QUICK: dict[str, tuple[Case, ...]] = {
    "llama3.2-1b": (Batch(1, 128, 64), Batch(32, 128, 64), Load(128, (50, 256), (50, 256))),
    "llama3-8b": (Batch(1, 128, 64), Batch(8, 128, 64)),
}
SUITES = {"standard": STANDARD, "quick": QUICK}
_CHECKED = 2
"""Requests of each case whose tokens are compared with the reference's."""
_LONGEST_CHECKED = 512


@dataclass(frozen=True)
class Plan:
    """What to measure of one network; `peers` are names of `vllm.MODES` and "transformers"."""

    cases: tuple[Case, ...]
    runs: int = 3
    peers: tuple[str, ...] = ()

    @property
    def longest(self) -> int:
        """Tokens of the longest request."""
        return max(case.longest for case in self.cases)


def measure(
    shape: str,
    plan: Plan,
    roof: Ceilings | None,
    *,
    device: str,
    dtype: str,
    configure: Callable[[int], EngineConfig],
) -> Iterator[Row]:
    """Every engine's rows on one published shape with random weights.

    `configure` gives the engine's settings for a context of so many tokens.

    Raises:
        UnknownNameError, DeviceError, SettingsError: as `subject`.
    """
    network = Network(shapes.named(shape), DTYPES[dtype], roof)
    context = min(network.config.max_position, max(plan.longest, 4096))
    subject = random_subject(None, shape, device=device, dtype=dtype, config=configure(context))
    yield from in_process(subject, plan, network)
    del subject
    let_go()
    for peer in plan.peers:
        if peer in vllm.MODES:
            yield from in_vllm(shape, peer, plan, network)


def in_process(subject: Subject, plan: Plan, network: Network) -> Iterator[Row]:
    """strobe's rows, and transformers' of each batch where it is asked for."""
    engines: list[Strobe | Transformers] = [Strobe(subject)]
    if "transformers" in plan.peers:
        engines.append(Transformers(subject))
    for case in plan.cases:
        for engine in engines:
            if isinstance(case, Load) and isinstance(engine, Transformers):
                continue  # whose batches are padded: `strobe bench throughput` finds the size that suits it
            jobs = case.jobs(network.config.vocab_size, plan.runs)
            row: Row = {
                "case": subject.case(**case.sizes()),
                "provider": _provider(subject, engine),
                **({"engine": _chosen(subject.engine.config)} if isinstance(engine, Strobe) else {}),
                "checked": holds(subject, engine, jobs[-1]),
            }
            if row["checked"]:
                row |= case.figures([_seconds(engine, job) for job in jobs], network)
            yield row


def in_vllm(shape: str, peer: str, plan: Plan, network: Network) -> Iterator[Row]:
    """vLLM's rows, on weights that it draws itself; a case that fails there has a row with `failed`."""
    vocab_size, dtype = network.config.vocab_size, str(network.dtype).removeprefix("torch.")
    jobs = [case.jobs(vocab_size, plan.runs) for case in plan.cases]
    flat = [job for each in jobs for job in each]
    longest = min(network.config.max_position, max(plan.longest, 4096))
    found, about = vllm.measure(network.config, dtype, flat, peer=peer, max_model_len=longest)
    results = iter(found)
    for case, each in zip(plan.cases, jobs, strict=True):
        taken = [next(results) for _ in each]
        described = {"model": shape, "weights": "random", **case.sizes(), "dtype": dtype}
        row: Row = {"case": described, "provider": peer, "checked": None, **about}
        failed = next((result for result in taken if isinstance(result, str)), None)
        if failed is not None:
            yield row | {"failed": failed}
        else:
            yield row | case.figures([s for s in taken if not isinstance(s, str)], network)


def holds(subject: Subject, engine: Strobe | Transformers, job: Job) -> bool:
    """Whether the first and the last request get the tokens that PyTorch's own calls would write."""
    outputs = [min(output, _LONGEST_CHECKED) for output in job.outputs]
    answers = _many(engine, job.prompts, outputs)
    picked = sorted({0, len(answers) - 1})[:_CHECKED]
    return all(first_wrong(subject.model, job.prompts[i], answers[i]) is None for i in picked)


def _provider(subject: Subject, engine: Strobe | Transformers) -> str:
    """What `deterministic` costs is told beside the rows without it, in one file (`merged`)."""
    exact = isinstance(engine, Strobe) and subject.engine.config.deterministic
    return f"{engine.name}, deterministic" if exact else engine.name


def _chosen(config: EngineConfig) -> dict[str, Any]:
    """The settings that are not the defaults."""
    return {
        each.name: value for each in fields(config) if (value := getattr(config, each.name)) != each.default
    }


def merged(before: Result | None, rows: Sequence[Row]) -> list[Row]:
    """`rows`, with those of an earlier file that are of other models, or of engines that did not run now.

    Those say from which commit they are.
    """
    if before is None:
        return list(rows)
    here = {(row["case"]["model"], row["provider"]) for row in rows}
    kept = [
        {"commit": before.commit, **row}
        for row in before.rows
        if (row["case"]["model"], row["provider"]) not in here
    ]
    order = {model: index for index, model in enumerate(STANDARD)}
    return sorted([*kept, *rows], key=lambda row: order.get(row["case"]["model"], len(order)))


def _many(
    engine: Strobe | Transformers, prompts: Sequence[Sequence[int]], outputs: Sequence[int]
) -> list[tuple[int, ...]]:
    if isinstance(engine, Transformers):
        return engine.many(prompts, outputs, len(prompts))
    return engine.many(prompts, outputs)


def _seconds(engine: Strobe | Transformers, job: Job) -> list[float]:
    """Seconds of each run, after a shorter one that nobody times, in which every size of batch occurs."""
    _many(engine, job.prompts, [min(output, 1 + index % 32) for index, output in enumerate(job.outputs)])
    found = []
    for _ in range(job.runs):
        start = time.perf_counter()
        _many(engine, job.prompts, job.outputs)
        found.append(time.perf_counter() - start)
    return found
