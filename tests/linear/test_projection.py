"""The product against float64, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from projection_formula import formula

from strobe.errors import KernelRefusedError, ProblemError, UnknownNameError
from strobe.linear import Projection, empty_weight, ladder, torch_onednn
from strobe.linear.problem import LinearProblem
from strobe.models.config import Rope
from strobe.ops import cache, rope

SIZES = st.integers(1, 70)


ON_CPU = [name for name in ladder.RUNGS if not name.startswith("cuda_")]


@pytest.mark.parametrize("kernel", ["auto", *ON_CPU])
@given(
    tokens=st.integers(0, 18),
    inputs=SIZES,
    outputs=SIZES,
    around=st.tuples(*[st.booleans()] * 4),
    input_major=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_equals_the_formula(kernel, tokens, inputs, outputs, around, input_major, seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    biased, normed, swiglu, added = around
    weight = draw(2 * outputs if swiglu else outputs, inputs)
    if input_major:
        weight = empty_weight(*weight.shape, device="cpu", dtype=weight.dtype).copy_(weight)
    projection = Projection(
        weight,
        bias=draw(len(weight)) if biased else None,
        norm=draw(inputs) if normed else None,
        norm_eps=1e-3,
        swiglu=swiglu,
    )
    x, residual = draw(tokens, inputs), draw(tokens, outputs) if added else None
    was, expected = x.clone(), formula(x, projection, residual)
    try:
        given = projection(x, residual, kernel)
    except KernelRefusedError:
        assert kernel != "auto"
        return
    assert residual is None or given is residual
    assert torch.equal(x, was)
    torch.testing.assert_close(given, expected.float(), rtol=1e-4, atol=1e-4 * inputs**0.5)


@pytest.mark.parametrize("rung", ladder.RUNGS)
def test_every_rung_says_its_idea_and_its_refusals(rung):
    idea = ladder.RUNGS[rung].idea
    assert idea.strip()
    assert "\n" not in idea
    reasons = ladder.RUNGS[rung].refusals(LinearProblem(1, 64, 64, "float64"))
    assert bool(reasons) == (rung not in ("torch_linear", "batch_invariant"))
    assert all(reason.strip() for reason in reasons)


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
        Projection(weight)(x)


def test_refuses_a_residual_that_does_not_fit():
    gate_up = Projection(torch.zeros(4, 3), swiglu=True)
    assert gate_up(torch.zeros(2, 3), torch.zeros(2, 2)).shape == (2, 2)
    for residual in (torch.zeros(2, 4), torch.zeros(2, 2).double(), torch.zeros(2, 4)[:, ::2]):
        with pytest.raises(ProblemError, match="residual"):
            gate_up(torch.zeros(2, 3), residual)


def test_a_gate_needs_its_other_half():
    with pytest.raises(ProblemError, match="even"):
        Projection(torch.zeros(3, 3), swiglu=True)(torch.zeros(2, 3))


@pytest.mark.parametrize("norm", [torch.zeros(4), torch.zeros(3).double()])
def test_refuses_a_norm_that_does_not_fit(norm):
    with pytest.raises(ProblemError, match="norm"):
        Projection(torch.zeros(4, 3), norm=norm)(torch.zeros(2, 3))


@pytest.mark.parametrize("bias", [torch.zeros(3), torch.zeros(4, 1), torch.zeros(4).double()])
def test_refuses_a_bias_that_does_not_fit(bias):
    with pytest.raises(ProblemError, match="bias"):
        Projection(torch.zeros(4, 3), bias)(torch.zeros(2, 3))


@given(SIZES, SIZES, st.integers(1, 9))
def test_any_layout_on_a_cpu(inputs, outputs, tokens):
    x, plain = torch.randn(tokens, inputs), torch.randn(outputs, inputs)
    weight = empty_weight(outputs, inputs, device="cpu", dtype=torch.float32)
    torch.testing.assert_close(Projection(weight.copy_(plain))(x), Projection(plain)(x))


@pytest.mark.parametrize("kernel", ["auto", *ON_CPU])
@given(
    tokens=st.integers(0, 18),
    heads=st.tuples(st.integers(1, 4), st.integers(1, 3)),
    seed=st.integers(0, 2**31),
)
def test_appends_what_it_projects(kernel, tokens, heads, seed):
    torch.manual_seed(seed)
    (q_heads, kv_heads), head_dim, inputs = heads, 16, 24
    qkv = Projection(torch.randn((q_heads + 2 * kv_heads) * head_dim, inputs), norm=torch.rand(inputs) + 0.5)
    x, pages = torch.randn(tokens, inputs), torch.randn(2, 5, 4, kv_heads, head_dim)
    turn = rope.angles(
        torch.randint(99, (tokens,)), rope.signed(Rope().frequencies(head_dim), "cpu"), x.dtype
    )
    slots, stored = torch.randperm(20)[:tokens], pages.clone()
    try:
        q = qkv.append(x, cache.Destination(turn, *stored, slots, cache.Options()), kernel)
    except KernelRefusedError:
        assert kernel != "auto"
        return
    out = formula(x, qkv, None).float().view(tokens, q_heads + 2 * kv_heads, head_dim)
    want_q, k, v = out.split_with_sizes((q_heads, kv_heads, kv_heads), 1)
    want_q, k = rope.rotate(want_q, *turn), rope.rotate(k, *turn)
    want = torch.stack(
        [x.flatten(0, 1).index_copy(0, slots, new) for x, new in zip(pages, (k, v), strict=True)]
    )
    torch.testing.assert_close(q, want_q, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(stored.flatten(1, 2), want, rtol=1e-4, atol=1e-4)


def test_refuses_a_cache_of_other_heads():
    pages, turn = torch.zeros(1, 4, 2, 16), (torch.ones(1, 1, 16), torch.zeros(1, 1, 16))
    to = cache.Destination(turn, pages, pages.clone(), torch.zeros(1, dtype=torch.int64), cache.Options())
    with pytest.raises(ProblemError, match=r"64 outputs.*supported: \(q_heads \+ 2 kv_heads\) head_dim"):
        Projection(torch.zeros(64, 8)).append(torch.zeros(1, 8), to)


def test_several_kernels_are_tried_in_order():
    def first(problem: LinearProblem) -> str:
        rung, _ = ladder.choose(problem, "cuda_gemv,torch_onednn,torch_linear")
        return rung.name

    on_gpu = {"dtype": "bfloat16", "device": "cuda", "arch": 90}
    assert first(LinearProblem(1, 64, 64, "float32")) == "torch_linear"
    assert first(LinearProblem(1, 64, 64, **on_gpu)) == "cuda_gemv"
    assert first(LinearProblem(500, 64, 64, **on_gpu)) == "torch_linear"


def test_several_kernels_never_fall_back_on_another():
    with pytest.raises(KernelRefusedError, match=r"'cuda_gemv' refuses .*; .*'cuda_matmul_tiled' refuses"):
        Projection(torch.zeros(3, 8))(torch.zeros(1, 8), kernel="cuda_gemv,cuda_matmul_tiled")
    with pytest.raises(UnknownNameError, match="did you mean 'cuda_gemv'"):
        Projection(torch.zeros(3, 8))(torch.zeros(1, 8), kernel="torch_linear,cuda_gemm")


def test_unknown_kernel_names_the_nearest():
    with pytest.raises(UnknownNameError, match="did you mean 'torch_linear'"):
        Projection(torch.zeros(3, 2))(torch.zeros(1, 2), kernel="torch_liner")


def test_onednn_meets_few_sizes_and_pads_little() -> None:
    sizes = [torch_onednn.rounded(tokens) for tokens in range(1, 4097)]
    assert all(tokens <= size <= max(tokens + 1, tokens * 9 / 8) for tokens, size in enumerate(sizes, 1))
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 16 + 8 * 8
