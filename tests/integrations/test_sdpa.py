"""torch's scaled_dot_product_attention over strobe, against torch's own in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from strobe.errors import ProblemError
from strobe.integrations.sdpa import redirect, scaled_dot_product_attention


@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (6, 6), (4, 11), (11, 4)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_equals_torch(q_len: int, kv_len: int, is_causal: bool) -> None:
    q = torch.randn(2, 4, q_len, 16, dtype=torch.float64)
    k, v = torch.randn(2, 2, 4, kv_len, 16, dtype=torch.float64)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    torch.testing.assert_close(scaled_dot_product_attention(q, k, v, is_causal=is_causal), expected)


@pytest.mark.parametrize("shape", [(5, 7), (1, 7), (3, 5, 7), (2, 1, 5, 7), (2, 3, 5, 7)])
@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_masks(shape: tuple[int, ...], kind: str) -> None:
    q = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, 3, 7, 8, dtype=torch.float64)
    mask = torch.rand(shape) < 0.6 if kind == "bool" else torch.randn(shape, dtype=torch.float64)
    if kind == "bool":
        mask[..., 0] = True
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(scaled_dot_product_attention(q, k, v, attn_mask=mask), expected)


def test_other_ranks_scale_and_gqa() -> None:
    q, k, v = torch.randn(3, 5, 8), torch.randn(3, 6, 8), torch.randn(3, 6, 8)
    expected = F.scaled_dot_product_attention(q, k, v, scale=0.3)
    torch.testing.assert_close(scaled_dot_product_attention(q, k, v, scale=0.3), expected, atol=1e-6, rtol=0)
    q, k, v = torch.randn(2, 2, 6, 5, 8), torch.randn(2, 2, 2, 6, 8), torch.randn(2, 2, 2, 6, 8)
    expected = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    out = scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=0)
    with pytest.raises(ProblemError, match="enable_gqa"):
        scaled_dot_product_attention(q, k, v)


def test_a_row_masked_wholly_is_zero() -> None:
    q, k, v = torch.randn(3, 1, 2, 4, 8)
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[2] = False
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert torch.all(out[:, :, 2] == 0)
    assert not torch.any(out.isnan())


def test_redirect_takes_what_fits_and_passes_the_rest_on() -> None:
    q, k, v = torch.randn(3, 2, 4, 9, 16)
    plain = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    with redirect() as mode:
        torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v, is_causal=True), plain)
        assert (mode.taken, mode.passed_on) == (1, 0)
        F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
        assert (mode.taken, mode.passed_on) == (1, 1)
        F.scaled_dot_product_attention(q.clone().requires_grad_(), k, v).sum().backward()
        assert (mode.taken, mode.passed_on) == (1, 2)
    F.scaled_dot_product_attention(q, k, v)
    assert (mode.taken, mode.passed_on) == (1, 2)
