"""torch's scaled_dot_product_attention over strobe, against torch's own in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_upper_left

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


@pytest.mark.parametrize("shape", [(2, 1, 1, 5, 7), (1, 4, 1, 1, 7), (2, 4, 3, 5, 7), (4, 3, 5, 7), (5, 7)])
@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_masks_over_two_batch_dimensions(shape: tuple[int, ...], kind: str) -> None:
    q = torch.randn(2, 4, 3, 5, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, 4, 3, 7, 8, dtype=torch.float64)
    mask = torch.randn(shape, dtype=torch.float64)
    if kind == "bool":
        mask = mask > 0
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


def test_any_strides() -> None:
    q, k, v = torch.randn(3, 2, 4, 16, 9).transpose(-1, -2)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(scaled_dot_product_attention(q, k, v, is_causal=True), expected)


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


@pytest.mark.parametrize("training", [False, True])
def test_redirect_reaches_into_torchs_modules(training: bool) -> None:
    """torch.nn.MultiheadAttention, and the encoder layer's fused path, which stands aside for a mode."""
    attention = torch.nn.MultiheadAttention(24, 3, batch_first=True).train(training)
    layer = torch.nn.TransformerEncoderLayer(24, 3, 32, dropout=0.0, batch_first=True).train(training)
    x, torchs = torch.randn(2, 7, 24), F.scaled_dot_product_attention
    hidden = torch.zeros(2, 7, dtype=torch.bool)
    hidden[0, 4:] = True
    with torch.no_grad():
        expected = attention(x, x, x, need_weights=False)[0], layer(x, src_key_padding_mask=hidden)
        with redirect() as mode:
            given = attention(x, x, x, need_weights=False)[0], layer(x, src_key_padding_mask=hidden)
    assert (mode.taken, mode.passed_on) == (2, 0)
    assert F.scaled_dot_product_attention is torchs
    torch.testing.assert_close(given[0], expected[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(given[1][~hidden], expected[1][~hidden], atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtypes", ["fff", "ffb", "bff", "ddd"])
def test_autocast_is_followed(dtypes: str) -> None:
    kinds = {"f": torch.float32, "b": torch.bfloat16, "d": torch.float64}
    tensors = [torch.randn(2, 4, 9, 16).to(kinds[kind]) for kind in dtypes]
    mask = torch.randn(9, 9)
    for options in ({}, {"is_causal": True}, {"attn_mask": mask.to(tensors[0].dtype)}):
        with torch.autocast("cpu", torch.bfloat16):
            expected = F.scaled_dot_product_attention(*tensors, **options)
            with redirect() as mode:
                out = F.scaled_dot_product_attention(*tensors, **options)
        assert mode.taken == 1
        torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)  # and of its dtype


@pytest.mark.parametrize("width", [5, 24])
@pytest.mark.parametrize("is_causal", [False, True])
def test_values_of_another_width(width: int, is_causal: bool) -> None:
    q, k, v = torch.randn(2, 4, 9, 16), torch.randn(2, 2, 11, 16), torch.randn(2, 2, 11, width)
    given = {"is_causal": is_causal, "enable_gqa": True}
    expected = F.scaled_dot_product_attention(q, k, v, **given)
    torch.testing.assert_close(scaled_dot_product_attention(q, k, v, **given), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("q_shape", "kv_shape"),
    [((2, 3), (3, 2)), ((6,), (2, 3)), ((2,), (1,)), ((), (1,))],
)
def test_leading_dimensions_that_differ_are_refused(
    q_shape: tuple[int, ...], kv_shape: tuple[int, ...]
) -> None:
    q, k = torch.randn(*q_shape, 4, 5, 8), torch.randn(*kv_shape, 4, 7, 8)
    with pytest.raises(ProblemError, match="supported: equal leading dimensions"):
        scaled_dot_product_attention(q, k, k)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested", "ignore:There is a performance drop")
def test_redirect_passes_on_what_is_no_plain_tensor() -> None:
    x = torch.randn(3, 2, 4, 5, 8)
    jagged = torch.nested.nested_tensor([torch.randn(3, 4, 8), torch.randn(5, 4, 8)], layout=torch.jagged)
    jagged = jagged.transpose(1, 2)
    calls = (
        lambda: F.scaled_dot_product_attention(jagged, jagged, jagged).values(),
        lambda: F.scaled_dot_product_attention(*x, attn_mask=causal_upper_left(5, 5)),
        lambda: torch.vmap(lambda one: F.scaled_dot_product_attention(one, one, one))(x),
    )
    for number, call in enumerate(calls, start=1):
        expected = call()
        with redirect() as mode:
            torch.testing.assert_close(call(), expected)
        assert (mode.taken, mode.passed_on) == (0, 1), number


def test_redirect_is_traced() -> None:
    q, k, v = torch.randn(3, 2, 4, 5, 8)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    targets: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    with redirect():
        traced = torch.compile(
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
            backend=backend,
            fullgraph=True,
        )
        torch.testing.assert_close(traced(q, k, v), expected, atol=1e-5, rtol=0)
    assert any("strobe.attention" in target for target in targets)
