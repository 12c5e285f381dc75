"""A timeline of decode steps: what ran when, what stood idle between, and what each kind should have taken.

The spans are a GPU's kernels as CUPTI saw them (through torch.profiler), on a CPU torch's operators.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from strobe.bench import floor
from strobe.bench.ceilings import Ceilings
from strobe.bench.engine_cases import Batch
from strobe.bench.subject import Subject
from strobe.engine import Request, SamplingParams
from strobe.errors import DeviceError

_STEP = "strobe decode step"
_WARM_STEPS = 8

KINDS: dict[str, str] = {
    "attention": r"^(attend|decode|partials|merge|attention|_?flash|fmha)\b|split_kernel|scaled_dot_product",
    "products with the weights": (
        r"gemm|gemv|nvjet|cublas|cutlass|splitk|\bmm\b|addmm|matmul|linear|^(multiply|project)\b"
    ),
    "append": r"^append|index_copy",
    "sampling": r"^(sample|score)\b|argmax|topk|softmax|multinomial|philox",
    "norms and activations": r"norm|rsqrt|silu|swiglu|gelu",
    "copies": r"memcpy|memset|copy",
}
"""What a span is counted under: the first kind whose pattern its name has."""


@dataclass(frozen=True)
class Span:
    """One kernel or operator, in µs from any moment."""

    name: str
    start: float
    end: float


@dataclass
class Part:
    """What the spans of one name, or of one kind, took in a step.

    Time that several spans share counts for the one that began first: `us` of all parts make the busy time.
    A launch that starts beside the end of the one ahead mostly waits for it meanwhile; `beside_us` is that
    time, and what two streams have in common.
    """

    name: str
    calls: float = 0.0
    us: float = 0.0
    beside_us: float = 0.0
    bytes: float | None = None
    """Fewest that they must move in a step, where that is known."""
    floor_percent: float | None = None
    """Of `us`: over 100 where a kind reads ahead while it stands beside another."""


@dataclass(frozen=True)
class Gap:
    """Nothing ran for `us` between these two."""

    us: float
    after: str
    before: str


@dataclass
class Profile:
    """Per step, over `steps` of them. `busy_us` counts what spans share once."""

    case: dict[str, Any]
    steps: int
    step_us: float
    busy_us: float
    gaps: int
    floor_us: float | None = None
    kinds: list[Part] = field(default_factory=list)
    kernels: list[Part] = field(default_factory=list)
    largest_gaps: list[Gap] = field(default_factory=list)


def profile(
    subject: Subject, case: Batch, *, steps: int = 10, roof: Ceilings | None = None, trace: Path | None = None
) -> Profile:
    """Record `steps` decode steps of `case`, whose output must be long enough for them.

    `trace` is written for chrome://tracing or Perfetto.

    Raises:
        DeviceError: the profiler saw nothing run.
    """
    prompts = case.jobs(subject.model.config.vocab_size, 1)[0].prompts
    params = SamplingParams(temperature=0, max_tokens=_WARM_STEPS + steps + 2, ignore_eos=True)
    engine, on_gpu = subject.engine, subject.model.device.type == "cuda"
    for index, prompt in enumerate(prompts):
        engine.add(Request(str(index), prompt, params))
    while engine.stats().output_tokens == 0 or engine.stats().waiting:
        engine.step()
    for _ in range(_WARM_STEPS):
        engine.step()
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu:
        torch.cuda.synchronize()
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as recorded:
        for _ in range(steps):
            with torch.profiler.record_function(_STEP):
                engine.step()
        if on_gpu:
            torch.cuda.synchronize()
    while engine.has_work:
        engine.step()
    if trace is not None:
        recorded.export_chrome_trace(str(trace))
    spans = kernels_of(recorded.events()) if on_gpu else operators_of(recorded.events())
    if not spans:
        raise DeviceError("the profiler saw nothing run", hint="CUPTI may be in use by another profiler")
    found = summary(spans, steps, subject.case(**case.sizes()))
    if roof is not None:
        _against_floor(found, subject, case, roof)
    return found


def kernels_of(events: Sequence[Any]) -> list[Span]:
    """What ran on the GPU."""
    return [
        Span(_short(event.name), event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type == torch.profiler.DeviceType.CUDA and event.name != _STEP
    ]


def operators_of(events: Sequence[Any]) -> list[Span]:
    """The operators that the engine called, without those that they called in turn."""
    return [
        Span(_short(event.name), event.time_range.start, event.time_range.end)
        for event in events
        if event.cpu_parent is not None and event.cpu_parent.name == _STEP
    ]


def summary(spans: Sequence[Span], steps: int, case: dict[str, Any]) -> Profile:
    """Times by name and by kind, and the gaps between spans. Spans may overlap, as streams do."""
    ordered = sorted(spans, key=lambda span: span.start)
    by_name: dict[str, Part] = defaultdict(lambda: Part(""))
    by_kind: dict[str, Part] = defaultdict(lambda: Part(""))
    first = last = ordered[0]
    gaps, busy, covered = [], 0.0, first.start
    for span in ordered:
        if span.start > covered:
            gaps.append(Gap(span.start - covered, last.name, span.name))
        alone = max(0.0, span.end - max(span.start, covered))
        for parts, name in ((by_name, span.name), (by_kind, kind_of(span.name))):
            part = parts[name]
            part.name = name
            part.calls += 1 / steps
            part.us += alone / steps
            part.beside_us += (span.end - span.start - alone) / steps
        busy += alone
        if span.end > covered:
            last, covered = span, span.end
    return Profile(
        case=case,
        steps=steps,
        step_us=(covered - first.start) / steps,
        busy_us=busy / steps,
        gaps=len(gaps),
        kinds=sorted(by_kind.values(), key=lambda part: -part.us),
        kernels=sorted(by_name.values(), key=lambda part: -part.us),
        largest_gaps=sorted(gaps, key=lambda gap: -gap.us)[:5],
    )


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), "other")


def _against_floor(found: Profile, subject: Subject, case: Batch, roof: Ceilings) -> None:
    """What attention and the products read at least in a step, and in what time they could have."""
    config, dtype = subject.model.config, subject.model.dtype
    context = case.prompt + _WARM_STEPS + found.steps // 2
    needed = {
        "attention": case.batch * floor.kv_bytes(config, dtype, context),
        "products with the weights": floor.step_weight_bytes(config, dtype),
        "append": case.batch * floor.kv_bytes(config, dtype, 1),
    }
    for part in found.kinds:
        if part.name in needed:
            part.bytes = needed[part.name]
            part.floor_percent = 100 * part.bytes / roof.read_gbps * 1e-3 / part.us if part.us else None
    found.floor_us = (needed["attention"] + needed["products with the weights"]) / roof.read_gbps * 1e-3


def _short(name: str) -> str:
    """A kernel's name without its return type, its namespaces' template arguments and its parameters."""
    name = re.sub(r"^void ", "", name)
    name = re.sub(r"<.*", "", name) if len(name) > 60 else name
    return re.sub(r"\(.*", "", name)[:80].strip()
