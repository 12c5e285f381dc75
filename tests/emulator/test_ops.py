"""The kernels beside attention in the emulator: softmax, the cache's append and copies, matrix products."""

from __future__ import annotations

import pytest
import torch
from cuda_emulator import emulated_gpu

from strobe.linear import Projection
from strobe.ops import activation, cache, norm, pages, rope
from strobe.ops.embedding import embed
from strobe.ops.softmax import softmax

FP8 = torch.float8_e4m3fn
EPSILON = {torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float32: 2**-20}


@pytest.mark.parametrize("dtype", EPSILON, ids=str)
def test_softmax(dtype: torch.dtype) -> None:
    x = (5 * torch.randn(4, 331)).to(dtype)
    x[2] = float("-inf")
    x[3, :100] = float("-inf")
    with emulated_gpu():
        out = softmax(x)
    want = torch.softmax(x.double(), -1).nan_to_num(0.0)
    torch.testing.assert_close(out.double(), want, rtol=2 * EPSILON[dtype], atol=1e-7)


@pytest.mark.parametrize("dtype", EPSILON, ids=str)
@pytest.mark.parametrize("columns", [8, 328, 1000, 4096])
def test_norm_and_swiglu(columns: int, dtype: torch.dtype) -> None:
    x, weight = (torch.randn(5, columns) + 1).to(dtype), torch.randn(columns).to(dtype)
    gate_up = (3 * torch.randn(3, 2 * columns)).to(dtype)
    with emulated_gpu():
        normed = norm.rms_norm(x, weight, 1e-5, kernel="cuda")
        gated = activation.swiglu(gate_up, kernel="cuda")
        plain = norm.rms_norm(x[:, 1:].contiguous(), weight[1:], 1e-5)  # no whole vectors: torch runs it
    close = {"rtol": 4 * EPSILON[dtype], "atol": 4 * EPSILON[dtype]}
    torch.testing.assert_close(normed, norm.rms_norm_reference(x, weight, 1e-5), **close)
    torch.testing.assert_close(gated, activation.swiglu_reference(gate_up), **close)
    torch.testing.assert_close(plain, norm.rms_norm_reference(x[:, 1:], weight[1:], 1e-5), **close)


@pytest.mark.parametrize("dtype", EPSILON, ids=str)
@pytest.mark.parametrize("picked", [False, True])
def test_embed(dtype: torch.dtype, picked: bool) -> None:
    """The kernel against torch's way, by which a CPU goes."""
    tokens, hidden, head_dim = 7, 72, 34
    table, words = torch.randn(50, hidden).to(dtype), torch.randint(50, (tokens + 4,))
    picks = torch.randint(tokens + 4, (tokens,)) if picked else None
    positions = torch.randint(100_000, (tokens,))
    frequencies = rope.signed([1e4 ** (-2 * i / head_dim) for i in range(head_dim // 2)], "cpu")
    given = (words if picked else words[:tokens], table, positions, frequencies, picks)
    want_x, want_turn = embed(*given)
    with emulated_gpu():
        x, turn = embed(*given)
    assert torch.equal(x, want_x)
    for ours, theirs in zip(turn, want_turn, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2 * EPSILON[dtype], atol=2 * EPSILON[dtype])


@pytest.mark.parametrize("kernel", ["cuda_matmul_naive", "cuda_matmul_tiled", "cuda_gemv"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_products(kernel: str, dtype: torch.dtype) -> None:
    tokens, inputs, outputs = 3, 296, 67
    x = torch.randn(tokens, inputs).to(dtype)
    weight, bias = (torch.randn(outputs, inputs) * inputs**-0.5).to(dtype), torch.randn(outputs).to(dtype)
    want = x.double() @ weight.double().T + bias.double()
    with emulated_gpu():
        out = Projection(weight, bias)(x, kernel=kernel)
    summed = inputs * 2**-24 * (x.double().abs() @ weight.double().abs().T + 1)  # any order of a float32 sum
    assert ((out.double() - want).abs() <= EPSILON[dtype] * want.abs() + summed).all()


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, FP8], ids=str)
def test_append(kv_dtype: torch.dtype) -> None:
    """The kernel against torch's way, by which a CPU goes."""
    tokens, q_heads, kv_heads, head_dim = 13, 5, 2, 80
    fused = torch.randn(tokens, q_heads + 2 * kv_heads, head_dim).bfloat16()
    qk, v = fused.split_with_sizes((q_heads + kv_heads, kv_heads), 1)
    frequencies = rope.signed([1e4 ** (-2 * i / head_dim) for i in range(head_dim // 2)], "cpu")
    turn = rope.angles(torch.randint(9999, (tokens,)), frequencies, torch.bfloat16)
    slots = torch.randperm(5 * 16)[:tokens]
    want = torch.randn(2, 5, 16, kv_heads, head_dim).to(kv_dtype)
    stored = want.clone()
    scales = (torch.rand(2, kv_heads) + 0.1).unbind() if kv_dtype == FP8 else None
    want_q = cache.append_rotated(qk, v, turn, want[0], want[1], slots, cache.Options(scales=scales))
    with emulated_gpu():
        q = cache.append_rotated(qk, v, turn, stored[0], stored[1], slots, cache.Options(scales=scales))
    step = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(q.float(), want_q.float(), rtol=2 * step, atol=4 * step)
    rtol = 0.13 if kv_dtype == FP8 else 2 * step  # a neighbouring float8 at most
    torch.testing.assert_close(stored.float(), want.float(), rtol=rtol, atol=4 * step)


@pytest.mark.parametrize("launch_pages", [2, 65535])
def test_pages_are_copied(launch_pages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_MOST", launch_pages)
    k, v = torch.randn(2, 2, 11, 5, 2, 64).bfloat16()
    was = k.clone(), v.clone()
    source, target = torch.tensor([4, 0, 7]), torch.tensor([1, 2, 10])
    with emulated_gpu():
        pages.copy_pages(k, v, source, target)
    for after, before in zip((k, v), was, strict=True):
        before[:, target] = before[:, source]
        assert torch.equal(after, before)
    table = torch.randint(11, (7,))
    with emulated_gpu():
        gathered = pages.gather_pages(k[1], table)
    assert torch.equal(gathered, k[1][table].flatten(0, 1))
