"""The decode projection by whole warpgroups in the emulator, against the formula in float64."""

from __future__ import annotations

import torch
from cuda_emulator import emulated_gpu
from hypothesis import given, settings
from hypothesis import strategies as st
from projection_formula import formula

from strobe.linear import Projection, cuda_wgmma
from strobe.linear.problem import LinearProblem

DTYPES = [torch.bfloat16, torch.float16]


@settings(max_examples=10)
@given(
    tokens=st.integers(9, 64),
    inputs=st.integers(1, 200).map(lambda pieces: 8 * pieces),
    columns=st.integers(1, 80).map(lambda quads: 4 * quads),
    around=st.tuples(*[st.booleans()] * 4),
    dtype=st.sampled_from(DTYPES),
    sm_count=st.integers(1, 12),  # pairs, clusters of four, one block alone; one round and several
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
    out = residual if added else torch.full_like(residual, float("nan"))
    with emulated_gpu(sm_count=sm_count):
        cuda_wgmma.run(problem, x, projection, out)
    assert (out.double() - want).abs().max() <= 2 * torch.finfo(dtype).eps * want.abs().max()


def test_an_infinite_weight_stays_in_its_output() -> None:
    """Columns past the end of a row are not multiplied by what an earlier stage left there."""
    torch.manual_seed(0)
    weight = torch.randn(100, 1032).bfloat16()
    weight[5] = float("inf")
    x, out = torch.randn(17, 1032).bfloat16(), torch.full((17, 100), float("nan")).bfloat16()
    with emulated_gpu(sm_count=4):
        problem = LinearProblem(17, 1032, 100, "bfloat16", device="cuda", arch=90)
        cuda_wgmma.run(problem, x, Projection(weight), out)
    assert [i for i in range(100) if not out[:, i].isfinite().all()] == [5]


def test_a_call_uses_its_own_addresses() -> None:
    """The packed launch is kept; x and out are not."""
    torch.manual_seed(0)
    projection = Projection(torch.randn(40, 64).bfloat16(), norm=torch.ones(64).bfloat16(), norm_eps=1e-5)
    problem = LinearProblem(18, 64, 40, "bfloat16", norm=True, device="cuda", arch=90)
    xs = [torch.randn(18, 64).bfloat16() for _ in range(3)]
    xs[2] = torch.cat((xs[2].flatten(), xs[2].flatten()))[3 : 3 + 18 * 64].view(18, 64)  # not on 16 bytes
    outs = [torch.full((18, 40), float("nan")).bfloat16() for _ in xs]
    with emulated_gpu(sm_count=2):
        for x, out in zip(xs, outs, strict=True):
            cuda_wgmma.run(problem, x, projection, out)
    for x, out in zip(xs, outs, strict=True):
        want = formula(x, projection, None)
        assert (out.double() - want).abs().max() <= 2**-7 * want.abs().max()
    assert len(projection.scratch) == 1
