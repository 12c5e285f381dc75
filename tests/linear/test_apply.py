"""The product against float64, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from strobe import linear
from strobe.errors import ProblemError, UnknownNameError
from strobe.linear import ladder
from strobe.linear.problem import LinearProblem

SIZES = st.integers(1, 70)


@given(st.integers(0, 9), SIZES, SIZES, st.booleans(), st.integers(0, 2**31))
def test_equals_the_formula(tokens, inputs, outputs, with_bias, seed):
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias = (
        torch.randn(shape, generator=generator) for shape in ((tokens, inputs), (outputs, inputs), (outputs,))
    )
    expected = x.double() @ weight.double().t() + (bias.double() if with_bias else 0)
    given = linear.apply(x, weight, bias if with_bias else None)
    torch.testing.assert_close(given, expected.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rung", ladder.RUNGS)
def test_every_rung_says_its_idea_and_its_refusals(rung):
    assert ladder.RUNGS[rung].idea.strip()
    verdicts = ladder.explain(LinearProblem(1, 64, 64, "float32"))
    assert all(isinstance(reason, str) for reason in verdicts[rung])


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (torch.zeros(2, 3), torch.zeros(4, 5)),
        (torch.zeros(2, 3, 4), torch.zeros(4, 4)),
        (torch.zeros(2, 3), torch.zeros(3)),
        (torch.zeros(2, 3), torch.zeros(4, 3, dtype=torch.bfloat16)),
    ],
)
def test_refuses_what_does_not_fit(x, weight):
    with pytest.raises(ProblemError):
        linear.apply(x, weight)


def test_unknown_kernel_names_the_nearest():
    with pytest.raises(UnknownNameError, match="did you mean 'torch_linear'"):
        linear.apply(torch.zeros(1, 2), torch.zeros(3, 2), kernel="torch_liner")
