"""Times the matrix products over shapes: checked first, then timed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch

from strobe.bench.attention import torch_dtype
from strobe.bench.results import Row
from strobe.bench.timer import GraphClock, in_turns, measure
from strobe.linear import Projection, empty_weight, ladder
from strobe.linear.problem import LinearProblem

_WEIGHTS_BYTES = 192 << 20
"""A batch of one rotates among weights that together outgrow any L2 cache."""


def measure_all(
    shapes: Sequence[tuple[int, int, int]], dtype: str, device: str, arch: int = 0
) -> Iterator[Row]:
    """A row for each `(tokens, inputs, outputs)` and rung that does not refuse it."""
    kind = torch_dtype(dtype)
    for tokens, inputs, outputs in shapes:
        input_major = device == "cpu"  # as `empty_weight` lays them
        problem = LinearProblem(
            tokens, inputs, outputs, dtype, device=device, arch=arch, input_major=input_major
        )
        weight_bytes = inputs * outputs * kind.itemsize
        copies = max(1, min(16, _WEIGHTS_BYTES // weight_bytes))
        weights = [
            Projection(empty_weight(outputs, inputs, device=device, dtype=kind).normal_(0.0, inputs**-0.5))
            for _ in range(copies)
        ]
        x = torch.randn(tokens, inputs, device=device).to(kind)
        oracle = x.double() @ weights[0].weight.double().T
        plain_error = float(((x @ weights[0].weight.T).double() - oracle).abs().max())
        allowed = 2 * plain_error + torch.finfo(kind).eps * float(oracle.abs().max())
        for rung in ladder.RUNGS.values():
            if not rung.refusals(problem):
                out = torch.full((tokens, outputs), float("nan"), dtype=kind, device=device)
                rung.run(problem, x, weights[0], out)
                error = float((out.double() - oracle).abs().nan_to_num(nan=float("inf")).max())
                row = _figures(problem, rung, x, weights, out) if error <= allowed else {}
                yield {
                    "case": {"tokens": tokens, "inputs": inputs, "outputs": outputs, "dtype": dtype},
                    "provider": f"strobe:{rung.name}",
                    "checked": error <= allowed,
                    "error": error,
                    "error_allowed": allowed,
                    **row,
                }


def _figures(
    problem: LinearProblem, rung: ladder.Rung, x: torch.Tensor, weights: list[Projection], out: torch.Tensor
) -> Row:
    calls = [lambda w=w: rung.run(problem, x, w, out) for w in weights]
    turns = itertools.cycle(calls)
    if problem.device == "cuda":
        (timing,) = in_turns([GraphClock(calls)])
    else:
        timing = measure(lambda: next(turns)(), "cpu")
    flops = 2 * problem.tokens * problem.inputs * problem.outputs
    moved = x.nbytes + weights[0].weight.nbytes + out.nbytes
    return {
        "ms": timing.ms,
        "ms_min": timing.ms_min,
        "ms_max": timing.ms_max,
        "tflops": flops / timing.ms * 1e-9,
        "gbps": moved / timing.ms * 1e-6,
        "intensity": flops / moved,
    }
