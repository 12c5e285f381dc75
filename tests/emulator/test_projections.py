"""The decode projections in the emulator, against the formula in float64."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from cuda_emulator import emulated_gpu
from hypothesis import given, settings
from hypothesis import strategies as st
from projection_formula import around_a_product, formula

from strobe.linear import Projection, cuda_skinny, cuda_wgmma
from strobe.linear.problem import LinearProblem


@dataclass(frozen=True)
class Kind:
    """A rung and what it is given: `columns` are multiples of `grain`."""

    rung: ModuleType
    tokens: tuple[int, int]
    pieces: int  # of 8 inputs, at most
    columns: int
    grain: int
    sms: int


KINDS = [
    Kind(cuda_skinny, tokens=(1, 16), pieces=300, columns=300, grain=1, sms=5),
    # pairs, clusters of four, one block alone; one round and several
    Kind(cuda_wgmma, tokens=(17, 64), pieces=200, columns=320, grain=4, sms=12),
]
of_each = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.rung.__name__.rpartition(".")[2])


def problem_of(projection: Projection, tokens: int, *, residual: bool = False) -> LinearProblem:
    outputs, inputs = projection.weight.shape
    return LinearProblem(
        tokens,
        inputs,
        outputs,
        str(projection.weight.dtype).removeprefix("torch."),
        bias=projection.bias is not None,
        norm=projection.norm is not None,
        swiglu=projection.swiglu,
        residual=residual,
        device="cuda",
        arch=90,
    )


@of_each
@settings(max_examples=12)
@given(data=st.data())
def test_equals_the_formula(kind: Kind, data: st.DataObject) -> None:
    biased, normed, swiglu, added = data.draw(st.tuples(*[st.booleans()] * 4), label="around")
    fewest, most = kind.tokens
    if swiglu and kind.rung is cuda_wgmma:
        fewest = 9
    tokens = data.draw(st.integers(fewest, most), label="tokens")
    inputs = 8 * data.draw(st.integers(1, kind.pieces), label="eighths of inputs")
    columns = kind.grain * data.draw(st.integers(1, kind.columns // kind.grain), label="columns in grains")
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float16]), label="dtype")
    torch.manual_seed(data.draw(st.integers(0, 2**31), label="seed"))
    projection = around_a_product(inputs, columns, dtype, biased=biased, normed=normed, swiglu=swiglu)
    x, residual = (2 * torch.randn(tokens, inputs)).to(dtype), torch.randn(tokens, columns).to(dtype)
    want = formula(x, projection, residual if added else None)
    problem = problem_of(projection, tokens, residual=added)
    assert not kind.rung.refusals(problem)
    out = residual if added else torch.full_like(residual, float("nan"))
    with emulated_gpu(sm_count=data.draw(st.integers(1, kind.sms), label="sm_count")):
        kind.rung.run(problem, x, projection, out)
    assert (out.double() - want).abs().max() <= 2 * torch.finfo(dtype).eps * want.abs().max()


@pytest.mark.parametrize(
    ("rung", "tokens", "inputs", "sm_count"), [(cuda_skinny, 1, 3080, 1), (cuda_wgmma, 17, 1032, 4)]
)
def test_an_infinite_weight_stays_in_its_output(
    rung: ModuleType, tokens: int, inputs: int, sm_count: int
) -> None:
    """Columns past the end of a row are not multiplied by what an earlier stage left there."""
    torch.manual_seed(0)
    projection = Projection(torch.randn(100, inputs).bfloat16())
    projection.weight[5] = float("inf")
    x, out = torch.randn(tokens, inputs).bfloat16(), torch.full((tokens, 100), float("nan")).bfloat16()
    with emulated_gpu(sm_count=sm_count):
        rung.run(problem_of(projection, tokens), x, projection, out)
    assert [i for i in range(100) if not out[:, i].isfinite().all()] == [5]


@of_each
def test_a_call_uses_its_own_addresses(kind: Kind) -> None:
    """The packed launch is kept; x and out are not."""
    torch.manual_seed(0)
    tokens = kind.tokens[0] + 1
    projection = Projection(torch.randn(40, 64).bfloat16(), norm=torch.ones(64).bfloat16(), norm_eps=1e-5)
    xs = [torch.randn(tokens, 64).bfloat16() for _ in range(3)]
    xs[2] = torch.cat((xs[2].flatten(), xs[2].flatten()))[3:][: tokens * 64].view(
        tokens, 64
    )  # not on 16 bytes
    outs = [torch.full((tokens, 40), float("nan")).bfloat16() for _ in xs]
    with emulated_gpu(sm_count=2):
        for x, out in zip(xs, outs, strict=True):
            kind.rung.run(problem_of(projection, tokens), x, projection, out)
    for x, out in zip(xs, outs, strict=True):
        want = formula(x, projection, None)
        assert (out.double() - want).abs().max() <= 2**-7 * want.abs().max()
    assert len(projection.scratch) == 1
