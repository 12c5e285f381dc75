"""Flash decode in one kernel: a block a query head of a row."""

from __future__ import annotations

from pathlib import Path

import torch

from strobe.attention import dense, one_query
from strobe.attention.problem import AttentionProblem
from strobe.cuda import jit

IDEA = "a block a head of a row, its warps deal the keys among themselves and merge at the end"

_SOURCE = Path(__file__).with_suffix(".cu")
_THREADS = 256

refusals = one_query.cuda_refusals


def run(
    problem: AttentionProblem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    q, k, v = dense.aligned(q), dense.aligned(k), dense.aligned(v)
    decode = jit.kernel(_SOURCE, "decode", one_query.defines(problem), q.get_device())
    decode((problem.q_heads, problem.batch), _THREADS, one_query.params(problem, q, k, v, out, lse))


def sources(arch: str) -> list[jit.Source]:
    return [jit.Source(_SOURCE, one_query.defines(one_query.example(dim))) for dim in (64, 128)]
