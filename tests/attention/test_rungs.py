"""Every rung that runs on this machine's CPU, over the case table, against the float64 oracle."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from strobe.attention import ladder, oracle
from strobe.attention.api import empty_lse
from strobe.attention.cases import CORRECTNESS, Case, Inputs
from strobe.attention.check import verdict
from strobe.cpu import jit

CPU_RUNGS = [
    rung
    for rung in (*ladder.PREFILL, *ladder.DECODE)
    if "cuda_" not in rung.name and "triton_" not in rung.name
]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def poisoned_run(
    rung: ladder.Rung, inputs: Inputs, with_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    problem = replace(inputs.problem, return_lse=with_lse)
    out = torch.full_like(inputs.q, float("nan"))
    lse = torch.full_like(empty_lse(problem, inputs.q), float("nan")) if with_lse else None
    if out.numel():
        rung.run(problem, inputs.q, inputs.k, inputs.v, out, lse)
    return out, lse


@pytest.mark.parametrize("rung", CPU_RUNGS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_case_is_right_or_refused(rung: ladder.Rung, dtype: str) -> None:
    ran = 0
    for case in CORRECTNESS:
        seed = torch.seed() % 2**31
        inputs = case.inputs(DTYPES[dtype], seed=seed)
        with_lse = not rung.refusals(replace(inputs.problem, return_lse=True))
        if rung.refusals(replace(inputs.problem, return_lse=with_lse)):
            continue
        out, lse = poisoned_run(rung, inputs, with_lse)
        verdicts = verdict(inputs.problem, inputs.q, inputs.k, inputs.v, out, lse)
        assert verdicts.right, f"{case}, seed {seed}: {verdicts}"
        ran += 1
    if rung.name.startswith("numba_") and (dtype != "float32" or jit.refusals()):
        assert ran == 0  # float32 only, and only with numba
    else:
        assert ran >= (10 if rung in ladder.PREFILL else 5)


@pytest.mark.parametrize("rung", CPU_RUNGS, ids=str)
def test_float64_is_computed_in_float64_or_refused(rung: ladder.Rung) -> None:
    cases = [
        Case("dense", ((40, 150),), causal=True, softcap=9.0, sinks=True),
        Case("plain", ((40, 150),), window=(60, 3)),
        Case("step", ((1, 150), (1, 9)), layout="paged"),
    ]
    for case in cases:
        inputs = case.inputs(torch.float64, seed=torch.seed() % 2**31)
        with_lse = not rung.refusals(replace(inputs.problem, return_lse=True))
        if rung.refusals(replace(inputs.problem, return_lse=with_lse)):
            continue
        out, lse = poisoned_run(rung, inputs, with_lse)
        expected, expected_lse = oracle.attention(inputs.problem, inputs.q, inputs.k, inputs.v)
        np.testing.assert_allclose(out, expected, atol=1e-12)
        if lse is not None:
            np.testing.assert_allclose(lse, expected_lse, atol=1e-6)


@pytest.mark.parametrize("head_dim", [1, 40, 80, 128, 257])
def test_odd_head_dims(head_dim: int) -> None:
    case = Case("odd_head_dim", ((33, 70),), q_heads=6, kv_heads=2, head_dim=head_dim, causal=True)
    inputs = case.inputs(torch.float32)
    expected, expected_lse = oracle.attention(inputs.problem, inputs.q, inputs.k, inputs.v)
    for rung in ladder.PREFILL:
        if rung in CPU_RUNGS and not rung.refusals(replace(inputs.problem, return_lse=True)):
            out, lse = poisoned_run(rung, inputs, with_lse=True)
            assert lse is not None
            np.testing.assert_allclose(out, expected, atol=2e-6)
            np.testing.assert_allclose(lse, expected_lse, atol=1e-5)


def test_strided_inputs_are_read_where_they_stand() -> None:
    q, k, v = torch.randn(2, 37, 3, 5, 64).unbind(2)
    inputs = Inputs(q, k, v, {"causal": True})
    expected, _ = oracle.attention(inputs.problem, q, k, v)
    for rung in CPU_RUNGS:
        if rung.phase == "prefill":
            out, _ = poisoned_run(rung, inputs, with_lse=False)
            np.testing.assert_allclose(out, expected, atol=2e-6, err_msg=str(rung))


def test_a_wrong_answer_fails_the_check() -> None:
    inputs = Case("plain", ((50, 60),), causal=True).inputs(torch.float32)
    problem, (q, k, v) = inputs.problem, (inputs.q, inputs.k, inputs.v)
    out, lse = poisoned_run(ladder.find("torch_naive", "prefill"), inputs, with_lse=True)
    assert lse is not None
    assert verdict(problem, q, k, v, out, lse).right
    assert not verdict(problem, q, k, v, out * 1.001, lse).right
    assert not verdict(problem, q, k, v, out, lse + 0.01).right
    assert not verdict(replace(problem, causal=False, window=(-1, -1)), q, k, v, out, lse).right
    out[0, 3, 1, 7] = float("nan")
    assert not verdict(problem, q, k, v, out).right
