"""The rungs, in the order they are taught, and the choice among them.

A rung is a module with three names: `IDEA` (one line), `refusals(problem) -> list[str]` (why it can
not run a problem; empty when it can) and `run(problem, q, k, v, out, lse)` (fills `out`, and `lse`
where it is not None). Few take a bias: those that do say `TAKES_BIAS = True`. Those that are PyTorch's own
operators, through which gradients flow, say `DIFFERENTIABLE = True`. Those that start beside the kernel
ahead where the layout is `settled` say `READS_SETTLED = True`. One that is the fastest for a part of what it
runs says for which: `suits(problem) -> bool`. One whose calls cost the host too much has
`prepare(problem, q, k, v)` too: what it returns then runs every call whose tensors agree with these in
shape, strides, dtype and device, as `run(q, k, v, out, lse)`; out and lse are contiguous, and q's device is
the current one.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from strobe.attention.problem import AttentionProblem
from strobe.errors import KernelRefusedError, UnknownNameError


@dataclass(frozen=True)
class Rung:
    """One implementation of attention; its module is imported when it is first asked something."""

    phase: str
    name: str

    def __str__(self) -> str:
        return f"{self.phase}/{self.name}"

    @cached_property
    def module(self) -> Any:
        return importlib.import_module(f"strobe.attention.{self.phase}.{self.name}")

    @property
    def idea(self) -> str:
        return self.module.IDEA

    def refusals(self, problem: AttentionProblem) -> list[str]:
        reasons = self.module.refusals(problem)
        if problem.bias is not None and not getattr(self.module, "TAKES_BIAS", False):
            reasons = [*reasons, "no bias"]
        return reasons

    def suits(self, problem: AttentionProblem) -> bool:
        """Whether "auto" may take it for a problem that it does not refuse."""
        suits = getattr(self.module, "suits", None)
        return suits is None or suits(problem)

    @property
    def differentiable(self) -> bool:
        return getattr(self.module, "DIFFERENTIABLE", False)

    @property
    def reads_settled(self) -> bool:
        return getattr(self.module, "READS_SETTLED", False)

    def run(self, problem: AttentionProblem, q: Any, k: Any, v: Any, out: Any, lse: Any) -> None:
        self.module.run(problem, q, k, v, out, lse)

    def prepare(self, problem: AttentionProblem, q: Any, k: Any, v: Any) -> Callable[..., None]:
        """`run` of this problem, for tensors like these (plan.py)."""
        prepare = getattr(self.module, "prepare", None)
        return prepare(problem, q, k, v) if prepare else partial(self.module.run, problem)

    def source(self, problem: AttentionProblem) -> Any:
        """The `jit.Source` that running this compiles, if its module tells, by the shape that it chooses."""
        told = getattr(self.module, "source", None)
        return told(self.module.choose_shape(problem)) if told else None


PREFILL = tuple(
    Rung("prefill", name)
    for name in (
        "textbook",
        "numpy_tiled",
        "torch_naive",
        "torch_online",
        "torch_sdpa",
        "torch_cuda_softmax",
        "cuda_split",
        "cuda_fused_scalar",
        "cuda_fused_warp",
        "cuda_tensor_core",
        "cuda_dim_tiled",
        "cuda_split_kv",
        "cuda_async",
        "triton_fused",
        "cuda_hopper",
    )
)
DECODE = tuple(
    Rung("decode", name)
    for name in (
        "torch_grouped",
        "numba_paged",
        "cuda_single",
        "cuda_split",
        "triton_split",
        "cuda_paged",
        "cuda_cluster",
    )
)

FASTEST_FIRST = {
    "prefill": (
        "prefill/cuda_hopper",
        "prefill/cuda_async",
        "decode/numba_paged",
        "prefill/torch_sdpa",
        "prefill/torch_naive",
    ),
    "decode": (
        "decode/cuda_cluster",
        "decode/cuda_paged",
        "prefill/cuda_async",
        "decode/numba_paged",
        "decode/torch_grouped",
        "prefill/torch_sdpa",
        "prefill/torch_naive",
    ),
}
"""What `kernel="auto"` tries, by the problem's phase. The order is measured: docs/ladder.md."""

RUNGS = {str(rung): rung for rung in (*PREFILL, *DECODE)}


def find(kernel: str, phase: str) -> Rung:
    """The rung of this name: "prefill/x" and "decode/x" say which ladder; "x" prefers `phase`'s own."""
    other = {"prefill": "decode", "decode": "prefill"}[phase]
    for name in (kernel, f"{phase}/{kernel}", f"{other}/{kernel}"):
        if name in RUNGS:
            return RUNGS[name]
    raise UnknownNameError.among("kernel", kernel, ["auto", *dict.fromkeys(r.name for r in RUNGS.values())])


def choose(problem: AttentionProblem, kernel: str = "auto") -> Rung:
    """The rung that runs `problem`.

    "auto" takes the fastest that refuses nothing and suits. A name takes that rung or raises
    KernelRefusedError with its refusals: it never falls back.
    """
    if kernel != "auto":
        rung = find(kernel, problem.phase)
        if reasons := rung.refusals(problem):
            raise KernelRefusedError(
                f"kernel {rung.name!r} refuses ({problem}): {'; '.join(reasons)}",
                hint="kernel='auto' takes one that fits; `strobe explain` shows each kernel's verdict",
            )
        return rung
    for name in FASTEST_FIRST[problem.phase]:
        rung = RUNGS[name]
        if not rung.refusals(problem) and rung.suits(problem):
            return rung
    verdicts = "; ".join(f"{name}: {', '.join(reasons)}" for name, reasons in explain(problem).items())
    raise KernelRefusedError(f"no kernel runs ({problem}): {verdicts}")


def explain(problem: AttentionProblem) -> dict[str, list[str]]:
    """Every rung's refusals of `problem`, by name; an empty list means that it would run."""
    return {str(rung): rung.refusals(problem) for rung in RUNGS.values()}
