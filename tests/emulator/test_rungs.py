"""The CUDA rungs of attention in the emulator, on small odd problems, against the oracle."""

from __future__ import annotations

import pytest
import torch
from cuda_emulator import emulated_gpu, missing

from strobe.attention import ladder
from strobe.attention.api import empty_lse
from strobe.attention.cases import CORRECTNESS
from strobe.attention.check import verdict

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

CASES = {case.name: case for case in CORRECTNESS}


@pytest.mark.parametrize(
    "rung", ["prefill/cuda_split", "prefill/cuda_fused_scalar", "prefill/cuda_fused_warp"]
)
@pytest.mark.parametrize("case", ["one_token", "odd_causal", "no_keys"])
def test_small_problems(rung: str, case: str) -> None:
    inputs = CASES[case].inputs(torch.float32)
    out = torch.full_like(inputs.q, float("nan"))
    with emulated_gpu():
        problem = inputs.problem
        assert not ladder.RUNGS[rung].refusals(problem)
        lse = empty_lse(problem, inputs.q).fill_(float("nan"))
        ladder.RUNGS[rung].run(problem, inputs.q, inputs.k, inputs.v, out, lse)
        judged = verdict(problem, inputs.q, inputs.k, inputs.v, out, lse)
    assert judged.right, str(judged)
