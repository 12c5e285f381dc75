"""cuda_split's four kernels, each alone, against float64."""

from __future__ import annotations

import pytest
import torch

from strobe.attention import dense
from strobe.attention.cases import Case, Inputs
from strobe.attention.prefill import cuda_split

pytestmark = pytest.mark.gpu

SHAPES = [(1, 1, 1), (33, 31, 40), (64, 64, 64), (77, 130, 128), (130, 77, 96)]
shapes = pytest.mark.parametrize(("q_len", "kv_len", "head_dim"), SHAPES)
dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])


def inputs_of(q_len: int, kv_len: int, head_dim: int, dtype: torch.dtype, causal: bool = False) -> Inputs:
    case = Case(f"split_{q_len}_{kv_len}_{head_dim}", ((q_len, kv_len),) * 2, 4, 2, head_dim, causal=causal)
    return case.inputs(dtype, "cuda")


def call_of(inputs: Inputs, out: torch.Tensor) -> dense.DenseParams:
    return dense.params(inputs.problem, inputs.q, inputs.k, inputs.v, out, None)


def float64_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """`[batch, length, heads, dim]` → float64 `[batch x q_heads, length, dim]`, key heads repeated."""
    return x.double().repeat_interleave(heads // x.shape[2], dim=2).transpose(1, 2).flatten(0, 1)


@shapes
@dtypes
def test_scores(q_len: int, kv_len: int, head_dim: int, dtype: torch.dtype) -> None:
    inputs = inputs_of(q_len, kv_len, head_dim, dtype)
    s = torch.full((8, q_len, kv_len), float("nan"), device="cuda")
    cuda_split.scores(inputs.problem, call_of(inputs, torch.empty_like(inputs.q)), s)
    want = float64_heads(inputs.q, 4) @ float64_heads(inputs.k, 4).transpose(1, 2)
    torch.testing.assert_close(s.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (5, 9), (9, 5), (300, 301)])
def test_scale_and_mask(q_len: int, kv_len: int) -> None:
    inputs = inputs_of(q_len, kv_len, 64, torch.float16, causal=True)
    before = torch.randn(8, q_len, kv_len, device="cuda")
    s = before.clone()
    cuda_split.scale_and_mask(inputs.problem, call_of(inputs, torch.empty_like(inputs.q)), s)
    seen = torch.ones(q_len, kv_len, dtype=torch.bool, device="cuda").tril(kv_len - q_len)
    torch.testing.assert_close(s, (before * 0.125).masked_fill(~seen, float("-inf")))


@pytest.mark.parametrize("kv_len", [0, 1, 31, 256, 257, 5000])
def test_softmax_rows(kv_len: int) -> None:
    problem = inputs_of(3, kv_len, 64, torch.float16).problem
    s = 10 * torch.randn(8, 3, kv_len, device="cuda")
    s[1, 2] = float("-inf")
    want, want_lse = torch.softmax(s.double(), -1).nan_to_num(0.0), torch.logsumexp(s.double(), -1)
    lse = torch.full((2, 4, 3), float("nan"), device="cuda")
    cuda_split.softmax_rows(problem, s, lse)
    torch.testing.assert_close(s.double(), want, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(lse.flatten(0, 1).double(), want_lse, rtol=1e-5, atol=1e-5)


@shapes
@dtypes
def test_weigh_values(q_len: int, kv_len: int, head_dim: int, dtype: torch.dtype) -> None:
    inputs = inputs_of(q_len, kv_len, head_dim, dtype)
    weights = torch.softmax(torch.randn(8, q_len, kv_len, device="cuda"), -1)
    out = torch.full_like(inputs.q, float("nan"))
    cuda_split.weigh_values(inputs.problem, call_of(inputs, out), weights)
    want = weights.double() @ float64_heads(inputs.v, 4)
    tolerance = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-5}[dtype]
    got = out.double().transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
