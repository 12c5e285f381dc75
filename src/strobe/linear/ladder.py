"""The rungs of the matrix product, and the choice among them.

A rung is a module of this package with `IDEA` (one line), `refusals(problem) -> list[str]` and
`run(problem, x, projection, out)`, which fills `out [tokens, problem.columns]`, or adds to it where
`problem.residual`. It does what the problem says and no more: `projection.norm` may be there and
`problem.norm` False, since what a rung does not fuse is done beside it. One that appends (`problem.append`)
has `append(problem, x, projection, destination, out)` for that. One that compiles a kernel for each problem
tells which: `source(problem)`.
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

    def run(self, problem: LinearProblem, x: Any, projection: Any, out: Any) -> None:
        self.module.run(problem, x, projection, out)

    def append(self, problem: LinearProblem, x: Any, projection: Any, destination: Any, out: Any) -> None:
        self.module.append(problem, x, projection, destination, out)

    def source(self, problem: LinearProblem) -> Any:
        """The `jit.Source` that running this compiles on the current GPU, if its module tells."""
        told = getattr(self.module, "source", None)
        return told(problem) if told else None


RUNGS = {
    name: Rung(name)
    for name in (
        "cuda_matmul_naive",
        "cuda_matmul_tiled",
        "cuda_gemv",
        "cuda_skinny",
        "cuda_wgmma",
        "torch_linear",
        "batch_invariant",
        "torch_onednn",
        "numba_tiled",
    )
}
"""In teaching order."""

FASTEST_FIRST = ("numba_tiled", "torch_onednn", "cuda_wgmma", "cuda_skinny", "torch_linear")
"""What `kernel="auto"` tries; the last refuses nothing."""


def named(kernel: str) -> tuple[Rung, ...]:
    """The rungs to try in order: "auto" is `FASTEST_FIRST`, "cuda_gemv,torch_linear" these two.

    Raises:
        UnknownNameError: no rung has this name.
    """
    names = FASTEST_FIRST if kernel == "auto" else kernel.split(",")
    for name in names:
        if name not in RUNGS:
            raise UnknownNameError.among("linear kernel", name, ["auto", *RUNGS])
    return tuple(RUNGS[name] for name in names)


def choose(problem: LinearProblem, kernel: str = "auto") -> tuple[Rung, LinearProblem]:
    """The first of `named(kernel)` that refuses nothing, and what it is to run: `problem`, or its plain
    product where it fuses no more. There is no falling back on what was not named.

    Raises:
        UnknownNameError: no rung has this name.
        KernelRefusedError: none of these rungs can run this; each reason is in the message.
    """
    refused = []
    for rung in named(kernel):
        for run in (problem, problem.plain):
            if not (reasons := rung.refusals(run)):
                return rung, run
        refused.append(f"linear kernel {rung.name!r} refuses ({problem.plain}): {'; '.join(reasons)}")
    raise KernelRefusedError("; ".join(refused), hint="kernel='auto' takes one that fits")
