"""The cache's kernels on a GPU against what torch does on a CPU."""

from __future__ import annotations

import pytest
import torch

from strobe.ops import cache, pages, rope
from strobe.ops.norm import rms_norm

pytestmark = pytest.mark.gpu

FP8 = torch.float8_e4m3fn


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("tokens", "q_heads", "kv_heads", "head_dim"), [(1, 32, 8, 128), (37, 5, 5, 80), (300, 4, 1, 64)]
)
@pytest.mark.parametrize("kv_dtype", [None, FP8], ids=["as q", "float8"])
def test_append_rotated(
    dtype: torch.dtype, tokens: int, q_heads: int, kv_heads: int, head_dim: int, kv_dtype: torch.dtype | None
) -> None:
    fused = torch.randn(tokens, q_heads + 2 * kv_heads, head_dim).to(dtype)
    qk, v = fused.split_with_sizes((q_heads + kv_heads, kv_heads), 1)
    positions = torch.randint(100_000, (tokens,))
    turn = rope.angles(
        positions, rope.signed([1e4 ** (-2 * i / head_dim) for i in range(head_dim // 2)], "cpu"), dtype
    )
    slots = torch.randperm(23 * 16)[:tokens]
    before = torch.randn(2, 23, 16, kv_heads, head_dim).to(kv_dtype or dtype)
    scales = None if kv_dtype is None else tuple(torch.rand(2, kv_heads) + 0.1)
    on_cpu, on_gpu = before.clone(), before.cuda()
    q = cache.append_rotated(qk, v, turn, on_cpu[0], on_cpu[1], slots, cache.Options(scales=scales))
    moved = [each.cuda() for each in (fused, *turn, slots)]
    qk_gpu, v_gpu = moved[0].split_with_sizes((q_heads + kv_heads, kv_heads), 1)
    scales_gpu = None if scales is None else tuple(scale.cuda() for scale in scales)
    q_gpu = cache.append_rotated(
        qk_gpu, v_gpu, (moved[1], moved[2]), on_gpu[0], on_gpu[1], moved[3], cache.Options(scales=scales_gpu)
    )
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(q_gpu.cpu().float(), q.float(), rtol=2 * step, atol=4 * step)
    rtol = 0.13 if kv_dtype else 2 * step  # a neighbouring float8 at most
    torch.testing.assert_close(on_gpu.cpu().float(), on_cpu.float(), rtol=rtol, atol=4 * step)
    untouched = torch.ones(23 * 16, dtype=torch.bool).index_fill_(0, slots, False)
    for after, was in zip(on_gpu.cpu().view(torch.uint8), before.view(torch.uint8), strict=True):
        assert torch.equal(after.flatten(0, 1)[untouched], was.flatten(0, 1)[untouched])


@pytest.mark.parametrize("early", [False, True], ids=["in turn", "early"])
@pytest.mark.parametrize(("tokens", "q_heads", "kv_heads", "head_dim"), [(1, 32, 8, 128), (37, 5, 5, 64)])
def test_append_norms_heads(tokens: int, q_heads: int, kv_heads: int, head_dim: int, early: bool) -> None:
    """The norms on the way against norms of their own before it."""
    fused = (2 * torch.randn(tokens, q_heads + 2 * kv_heads, head_dim, device="cuda")).bfloat16()
    qk, v = fused.split_with_sizes((q_heads + kv_heads, kv_heads), 1)
    frequencies = [1e4 ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    positions = torch.randint(100_000, (tokens,), device="cuda")
    turn = rope.angles(positions, rope.signed(frequencies, "cuda"), torch.bfloat16)
    weights = (torch.rand(2, head_dim, device="cuda") + 0.5).bfloat16()
    norms = cache.HeadNorms(weights[0], weights[1], 1e-6)
    slots = torch.randperm(23 * 16, device="cuda")[:tokens]
    stored = torch.zeros(2, 2, 23, 16, kv_heads, head_dim, device="cuda").bfloat16()
    normed = [
        rms_norm(x.contiguous(), w, norms.eps)
        for x, w in zip(qk.split_with_sizes((q_heads, kv_heads), 1), weights, strict=True)
    ]
    want = cache.append_rotated(torch.cat(normed, 1), v, turn, stored[0, 0], stored[0, 1], slots)
    torch.cuda.synchronize()  # what is read early is there before the kernel just ahead starts
    got = cache.append_rotated(
        qk, v, turn, stored[1, 0], stored[1, 1], slots, cache.Options(norms, settled=early)
    )
    torch.testing.assert_close(got.float(), want.float(), rtol=2**-6, atol=2**-5)
    torch.testing.assert_close(stored[1].float(), stored[0].float(), rtol=2**-6, atol=2**-5)


def test_append_saturates_a_float8_cache() -> None:
    k = torch.full((1, 2, 64), 1e4, device="cuda").bfloat16()
    stored = torch.zeros(2, 1, 4, 2, 64, device="cuda").to(FP8)
    cache.append(k, -k, stored[0], stored[1], torch.tensor([2], device="cuda"))
    assert stored[0, 0, 2].float().unique().tolist() == [448.0]
    assert stored[1, 0, 2].float().unique().tolist() == [-448.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8], ids=str)
def test_pages_are_copied_and_gathered(dtype: torch.dtype) -> None:
    k, v = torch.randn(2, 3, 11, 5, 2, 64, device="cuda").to(dtype)
    was = k.clone(), v.clone()
    source, target = torch.tensor([4, 0, 7], device="cuda"), torch.tensor([1, 2, 10], device="cuda")
    pages.copy_pages(k, v, source, target)
    for after, before in zip((k, v), was, strict=True):
        expected = before.view(torch.uint8).clone()
        expected[:, target] = expected[:, source]
        assert torch.equal(after.view(torch.uint8), expected)
    table = torch.tensor([3, 3, 10, 0], device="cuda")
    gathered = pages.gather_pages(k[1], table)
    assert gathered.shape == (20, 2, 64)
    assert torch.equal(gathered.view(torch.uint8), k[1].view(torch.uint8)[table].flatten(0, 1))
