"""The rungs of the matrix product, and the choice among them.

A rung is a module of this package with `IDEA` (one line), `refusals(problem) -> list[str]` and
`run(problem, x, weight, bias, out)`, which fills `out [tokens, outputs]`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from strobe.errors import KernelRefusedError, UnknownNameError
from strobe.linear.problem import LinearProblem


@dataclass(frozen=True)
class Rung:
    """One implementation; its module is imported when it is first asked something."""

    name: str

    @cached_property
    def module(self) -> Any:
        return importlib.import_module(f"strobe.linear.{self.name}")

    @property
    def idea(self) -> str:
        return self.module.IDEA

    def refusals(self, problem: LinearProblem) -> list[str]:
        return self.module.refusals(problem)

    def run(self, problem: LinearProblem, x: Any, weight: Any, bias: Any, out: Any) -> None:
        self.module.run(problem, x, weight, bias, out)


RUNGS = {
    name: Rung(name)
    for name in ("cuda_matmul_naive", "cuda_matmul_tiled", "cuda_gemv", "torch_linear", "torch_onednn")
}
"""In teaching order."""

FASTEST_FIRST = ("torch_onednn", "torch_linear")
"""What `kernel="auto"` tries."""


def choose(problem: LinearProblem, kernel: str = "auto") -> Rung:
    """The rung that runs `problem`: "auto" takes the fastest that refuses nothing; a name never falls back.

    Raises:
        UnknownNameError: no rung has this name.
        KernelRefusedError: the named rung cannot run this; each reason is in the message.
    """
    if kernel == "auto":
        return next(RUNGS[name] for name in FASTEST_FIRST if not RUNGS[name].refusals(problem))
    if kernel not in RUNGS:
        raise UnknownNameError.among("linear kernel", kernel, ["auto", *RUNGS])
    if reasons := RUNGS[kernel].refusals(problem):
        raise KernelRefusedError(
            f"linear kernel {kernel!r} refuses ({problem}): {'; '.join(reasons)}",
            hint="kernel='auto' takes one that fits",
        )
    return RUNGS[kernel]


def explain(problem: LinearProblem) -> dict[str, list[str]]:
    """Every rung's refusals of `problem`, by name; an empty list means that it would run."""
    return {name: rung.refusals(problem) for name, rung in RUNGS.items()}
