"""The oracle against PyTorch's own float64 attention and against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from strobe.attention import AttentionProblem, oracle
from strobe.attention.cases import Case


@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (7, 7), (5, 19), (64, 64)])
@pytest.mark.parametrize("causal", [False, True])
def test_equals_torch_in_float64(q_len: int, kv_len: int, causal: bool) -> None:
    inputs = Case("x", ((q_len, kv_len),) * 2, q_heads=6, kv_heads=3, head_dim=20, causal=causal).inputs(
        torch.float64
    )
    mask = torch.ones(q_len, kv_len, dtype=torch.bool).tril(kv_len - q_len) if causal else None
    q, k, v = (x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)
    out, lse = oracle.attention(inputs.problem, inputs.q, inputs.k, inputs.v)
    np.testing.assert_allclose(out, expected, atol=1e-12)
    scores = q @ k.repeat_interleave(2, 1).transpose(-1, -2) * 20**-0.5
    scores = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
    np.testing.assert_allclose(lse, scores.logsumexp(-1), atol=1e-12)


def test_by_hand() -> None:
    # two keys, scores 0 and ln 3: weights 1/4 and 3/4
    q, k = np.array([[[[1.0]]]]), np.array([[[[0.0]], [[math.log(3)]]]])
    v = np.array([[[[4.0]], [[8.0]]]])
    problem = AttentionProblem(1, 1, 2, 1, 1, 1, dtype="float64", scale=1.0)
    out, lse = oracle.attention(problem, q, k, v)
    assert out.item() == pytest.approx(7.0)
    assert lse.item() == pytest.approx(math.log(4))


def test_sink_by_hand() -> None:
    # the sink's weight is exp(ln 4) = 4 of a sum of 1 + 3 + 4
    q, k = np.array([[[[1.0]]]]), np.array([[[[0.0]], [[math.log(3)]]]])
    v = np.array([[[[4.0]], [[8.0]]]])
    sinks = np.array([math.log(4)])
    problem = AttentionProblem(1, 1, 2, 1, 1, 1, dtype="float64", scale=1.0, sinks=sinks)
    out, lse = oracle.attention(problem, q, k, v)
    assert out.item() == pytest.approx(3.5)
    assert lse.item() == pytest.approx(math.log(8))


def test_softcap_bounds_the_scores() -> None:
    case = Case("x", ((9, 30),), softcap=2.0, values="large")
    inputs = case.inputs(torch.float64)
    _, lse = oracle.attention(inputs.problem, inputs.q, inputs.k, inputs.v)
    assert np.all(lse <= 2.0 + math.log(30))
    assert np.all(lse >= -2.0 + math.log(30))


def test_windows_by_hand() -> None:
    def seen(window: tuple[int, int], causal: bool = False) -> list[list[int]]:
        problem = AttentionProblem(1, 3, 5, 1, 1, 8, window=window, causal=causal)
        return [np.flatnonzero(row).tolist() for row in oracle.visible(problem, 3, 5)]

    assert seen((-1, -1)) == [[0, 1, 2, 3, 4]] * 3
    assert seen((-1, -1), causal=True) == [[0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4]]
    assert seen((0, 0)) == [[2], [3], [4]]
    assert seen((1, 2)) == [[1, 2, 3, 4], [2, 3, 4], [3, 4]]
    assert seen((1, 2), causal=True) == [[1, 2], [2, 3], [3, 4]]


def test_rows_that_see_nothing_are_zero() -> None:
    inputs = Case("x", ((5, 2),), causal=True).inputs(torch.float64)
    out, lse = oracle.attention(inputs.problem, inputs.q, inputs.k, inputs.v)
    assert np.all(out[:, :3] == 0)
    assert np.all(lse[:, :, :3] == -np.inf)
    assert np.all(out[:, 3:] != 0)
    assert np.all(np.isfinite(lse[:, :, 3:]))
