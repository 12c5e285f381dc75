"""The decode projection and the small kernels beside it in the emulator, against the formula in float64."""

from __future__ import annotations

import pytest
import torch
from cuda_emulator import emulated_gpu
from hypothesis import given, settings
from hypothesis import strategies as st
from projection_formula import formula

from strobe.linear import Projection, cuda_skinny
from strobe.linear.problem import LinearProblem
from strobe.ops import activation, norm

DTYPES = [torch.bfloat16, torch.float16]


@settings(max_examples=14)
@given(
    tokens=st.integers(1, 16),
    inputs=st.integers(1, 300).map(lambda pieces: 8 * pieces),
    columns=st.integers(1, 300),
    around=st.tuples(*[st.booleans()] * 4),
    dtype=st.sampled_from(DTYPES),
    sm_count=st.integers(1, 5),
    seed=st.integers(0, 2**31),
)
def test_equals_the_formula(
    tokens: int,
    inputs: int,
    columns: int,
    around: tuple[bool, bool, bool, bool],
    dtype: torch.dtype,
    sm_count: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    biased, normed, swiglu, added = around
    rows = 2 * columns if swiglu else columns
    projection = Projection(
        (torch.randn(rows, inputs) * inputs**-0.5).to(dtype),
        bias=torch.randn(rows).to(dtype) if biased else None,
        norm=(torch.rand(inputs) + 0.5).to(dtype) if normed else None,
        norm_eps=1e-5,
        swiglu=swiglu,
    )
    x, residual = (2 * torch.randn(tokens, inputs)).to(dtype), torch.randn(tokens, columns).to(dtype)
    want = formula(x, projection, residual if added else None)
    flags = {"bias": biased, "norm": normed, "swiglu": swiglu, "residual": added}
    problem = LinearProblem(
        tokens, inputs, rows, str(dtype).removeprefix("torch."), device="cuda", arch=90, **flags
    )
    assert not cuda_skinny.refusals(problem)
    out = residual if added else torch.full_like(residual, float("nan"))
    with emulated_gpu(sm_count=sm_count):
        cuda_skinny.run(problem, x, projection, out)
    assert (out.double() - want).abs().max() <= 2 * torch.finfo(dtype).eps * want.abs().max()


def test_an_infinite_weight_stays_in_its_output() -> None:
    """Columns past the end of a row are not multiplied by what an earlier stage left there."""
    torch.manual_seed(0)
    weight = torch.randn(100, 3080).bfloat16()
    weight[5] = float("inf")
    x, out = torch.randn(1, 3080).bfloat16(), torch.full((1, 100), float("nan")).bfloat16()
    with emulated_gpu(sm_count=1):
        problem = LinearProblem(1, 3080, 100, "bfloat16", device="cuda", arch=90)
        cuda_skinny.run(problem, x, Projection(weight), out)
    assert [i for i in range(100) if not out[0, i].isfinite()] == [5]


def test_a_call_uses_its_own_addresses() -> None:
    """The packed launch is kept; x and out are not."""
    torch.manual_seed(0)
    projection = Projection(torch.randn(40, 64).bfloat16(), norm=torch.ones(64).bfloat16(), norm_eps=1e-5)
    problem = LinearProblem(2, 64, 40, "bfloat16", norm=True, device="cuda", arch=90)
    xs = [torch.randn(2, 64).bfloat16() for _ in range(3)]
    xs[2] = torch.cat((xs[2].flatten(), xs[2].flatten()))[3:131].view(2, 64)  # not on 16 bytes
    outs = [torch.full((2, 40), float("nan")).bfloat16() for _ in xs]
    with emulated_gpu(sm_count=2):
        for x, out in zip(xs, outs, strict=True):
            cuda_skinny.run(problem, x, projection, out)
    for x, out in zip(xs, outs, strict=True):
        want = formula(x, projection, None)
        assert (out.double() - want).abs().max() <= 2**-7 * want.abs().max()
    assert len(projection.scratch) == 1


@pytest.mark.parametrize(
    ("columns", "dtype"), [(1000, torch.bfloat16), (8, torch.float16), (4096, torch.float32)]
)
def test_norm_and_swiglu(columns: int, dtype: torch.dtype) -> None:
    torch.manual_seed(columns)
    x, weight = (3 * torch.randn(3, columns)).to(dtype), torch.randn(columns).to(dtype)
    gate_up = (3 * torch.randn(3, 2 * columns)).to(dtype)
    with emulated_gpu():
        normed = norm.rms_norm(x, weight, 1e-5, kernel="cuda")
        gated = activation.swiglu(gate_up, kernel="cuda")
    for given_, want in (
        (normed, norm.rms_norm_reference(x, weight, 1e-5)),
        (gated, activation.swiglu_reference(gate_up)),
    ):
        limit = 4 * torch.finfo(dtype).eps * want.double().abs().max()
        assert (given_.double() - want.double()).abs().max() <= limit
