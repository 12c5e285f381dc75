"""The product against float64, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from strobe import linear
from strobe.errors import KernelRefusedError, ProblemError, UnknownNameError
from strobe.linear import ladder, torch_onednn
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


@pytest.mark.parametrize("bias", [torch.zeros(3), torch.zeros(4, 1), torch.zeros(4).double()])
def test_refuses_a_bias_that_does_not_fit(bias):
    with pytest.raises(ProblemError, match="bias"):
        linear.apply(torch.zeros(2, 3), torch.zeros(4, 3), bias)


@given(SIZES, SIZES, st.integers(1, 9))
def test_any_layout_on_a_cpu(inputs, outputs, tokens):
    x, plain = torch.randn(tokens, inputs), torch.randn(outputs, inputs)
    weight = linear.empty_weight(outputs, inputs, device="cpu", dtype=torch.float32)
    torch.testing.assert_close(linear.apply(x, weight.copy_(plain)), linear.apply(x, plain))


def test_several_kernels_are_tried_in_order():
    names = "cuda_gemv,torch_onednn,torch_linear"
    assert ladder.choose(LinearProblem(1, 64, 64, "float32"), names).name == "torch_linear"
    on_gpu = {"dtype": "bfloat16", "device": "cuda", "arch": 90}
    assert ladder.choose(LinearProblem(1, 64, 64, **on_gpu), names).name == "cuda_gemv"
    assert ladder.choose(LinearProblem(500, 64, 64, **on_gpu), names).name == "torch_linear"


def test_several_kernels_never_fall_back_on_another():
    with pytest.raises(KernelRefusedError, match=r"'cuda_gemv' refuses .*; .*'cuda_matmul_tiled' refuses"):
        linear.apply(torch.zeros(1, 8), torch.zeros(3, 8), kernel="cuda_gemv,cuda_matmul_tiled")
    with pytest.raises(UnknownNameError, match="did you mean 'cuda_gemv'"):
        linear.apply(torch.zeros(1, 8), torch.zeros(3, 8), kernel="torch_linear,cuda_gemm")


def test_unknown_kernel_names_the_nearest():
    with pytest.raises(UnknownNameError, match="did you mean 'torch_linear'"):
        linear.apply(torch.zeros(1, 2), torch.zeros(3, 2), kernel="torch_liner")


def test_onednn_meets_few_sizes_and_pads_little() -> None:
    sizes = [torch_onednn.rounded(tokens) for tokens in range(1, 4097)]
    assert all(tokens <= size <= max(tokens + 1, tokens * 9 / 8) for tokens, size in enumerate(sizes, 1))
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 16 + 8 * 8
