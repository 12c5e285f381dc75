"""Tests that run CUDA kernels on the CPU: what they need, and how an answer is judged."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from cuda_emulator import emulated_gpu, missing

from strobe.attention.api import empty_lse
from strobe.attention.cases import Case
from strobe.attention.check import verdict
from strobe.attention.ladder import Rung


@pytest.fixture(autouse=True)
def _needs_a_compiler() -> None:
    if reason := missing():
        pytest.skip(reason)


@pytest.fixture
def wrong() -> Callable[..., str | None]:
    """What is wrong with a rung's answer in the emulator: None where nothing is, or it refuses the case."""
    return _wrong


def _wrong(rung: Rung, case: Case, dtype: torch.dtype, sm_count: int = 3) -> str | None:
    seed, last_block_first = random.randrange(2**31), random.random() < 0.5
    inputs = case.inputs(dtype, seed=seed)
    out = torch.full_like(inputs.q, float("nan"))
    with emulated_gpu(sm_count, last_block_first=last_block_first):
        problem = inputs.problem
        if rung.refusals(problem) or not out.numel():
            return None
        lse = empty_lse(problem, inputs.q).fill_(float("nan"))
        given = inputs.q, inputs.k, inputs.v
        rung.prepare(problem, *given)(*given, out, lse)
        judged = verdict(problem, inputs.q, inputs.k, inputs.v, out, lse)
    return None if judged.right else f"{case!r}, {seed=}, {last_block_first=}: {judged}"
