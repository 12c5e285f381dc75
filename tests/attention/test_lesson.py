"""The NumPy lesson's stages, and the module over attention()."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from strobe.attention.multihead import MultiHeadAttention
from strobe.attention.prefill import numpy_tiled, textbook
from strobe.errors import ProblemError


@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (11, 17), (9, 4), (5, 0)])
@pytest.mark.parametrize("causal", [False, True])
def test_every_stage_equals_the_textbook(q_len: int, kv_len: int, causal: bool) -> None:
    rng = np.random.default_rng()
    q = rng.standard_normal((q_len, 6), np.float32)
    k, v = rng.standard_normal((2, kv_len, 6), np.float32)
    mask = np.tril(np.ones((q_len, kv_len), bool), kv_len - q_len) if causal else None
    expected, expected_lse = textbook.attend(q, k, v, 0.4, mask)
    for stage in numpy_tiled.STAGES:
        result = numpy_tiled.attend(q, k, v, 0.4, mask, stage, tile=(4, 3))
        np.testing.assert_allclose(result.out, expected, atol=1e-6, err_msg=stage)
        np.testing.assert_allclose(result.lse, expected_lse, atol=1e-6, err_msg=stage)


def test_the_march_saves_memory() -> None:
    rng = np.random.default_rng()
    q, k, v = rng.standard_normal((3, 24, 6), np.float32)

    def scratch(stage: str, repeat: int = 1) -> int:
        many = (np.tile(x, (repeat, 1)) for x in (q, k, v))
        return numpy_tiled.attend(*many, 0.4, None, stage, tile=(4, 4)).scratch_bytes

    # staging K and V for every block costs memory; flat buffers a block at a time, then one set, then none
    assert scratch("blocks_and_threads") > scratch("flat_memory") > scratch("reused_buffers")
    assert scratch("reused_buffers") == scratch("reused_buffers", repeat=2)
    assert scratch("fused_in_place") == 0


@pytest.mark.parametrize("kernel", ["auto", "torch_naive", "textbook"])
def test_module_equals_torch(kernel: str) -> None:
    ours = MultiHeadAttention(48, 6, kernel=kernel).eval()
    theirs = torch.nn.MultiheadAttention(48, 6, batch_first=True).eval()
    torch.nn.init.normal_(theirs.in_proj_bias)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 21, 48)
    banned = torch.ones(21, 21, dtype=torch.bool).triu(1)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x, x, x, need_weights=False)[0], atol=1e-5, rtol=0)
        expected = theirs(x, x, x, attn_mask=banned, need_weights=False)[0]
        torch.testing.assert_close(ours(x, causal=True), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("widths", [{}, {"kdim": 20, "vdim": 28}, {"vdim": 12}], ids=str)
@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize("masks", ["", "attn_mask", "key_padding_mask", "attn_mask key_padding_mask"])
def test_module_equals_torch_across_sequences(
    bias: bool, widths: dict[str, int], kind: str, masks: str
) -> None:
    ours = MultiHeadAttention(24, 3, bias=bias, **widths).eval()
    theirs = torch.nn.MultiheadAttention(24, 3, bias=bias, batch_first=True, **widths).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours.load_state_dict(theirs.state_dict())
    query = torch.randn(2, 5, 24)
    key, value = (torch.randn(2, 9, widths.get(name, 24)) for name in ("kdim", "vdim"))
    past_end = torch.arange(9) >= torch.tensor([[9], [4]])
    for shape in ((5, 9), (6, 5, 9)):
        hidden = torch.rand(shape) < 0.4
        hidden[..., 0] = False
        given = {"attn_mask": hidden, "key_padding_mask": past_end}
        if kind == "additive":
            numbers = torch.zeros(past_end.shape).masked_fill(past_end, float("-inf"))
            given = {"attn_mask": torch.randn(shape), "key_padding_mask": numbers}
        given = {name: given[name] for name in masks.split()}
        with torch.no_grad():
            expected = theirs(query, key, value, need_weights=False, **given)[0]
            torch.testing.assert_close(ours(query, key, value, **given), expected, atol=2e-5, rtol=1e-5)


def test_module_learns_like_torch() -> None:
    ours = MultiHeadAttention(16, 2, kernel="torch_naive")
    theirs = torch.nn.MultiheadAttention(16, 2, batch_first=True)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 5, 16)
    ours(x).square().sum().backward()
    theirs(x, x, x, need_weights=False)[0].square().sum().backward()
    torch.testing.assert_close(ours.in_proj_weight.grad, theirs.in_proj_weight.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kernel", ["textbook", "numpy_tiled"])
def test_module_runs_by_numpy_where_torch_would_record_gradients(kernel: str) -> None:
    module, x = MultiHeadAttention(16, 2, kernel=kernel), torch.randn(2, 5, 16)
    given = module(x)
    module.kernel = "torch_naive"
    torch.testing.assert_close(given, module(x), atol=1e-5, rtol=0)


def test_module_refuses_heads_that_do_not_divide() -> None:
    with pytest.raises(ProblemError, match="embed_dim 10 is not a multiple of num_heads 3"):
        MultiHeadAttention(10, 3)
