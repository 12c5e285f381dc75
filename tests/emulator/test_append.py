"""The launch that norms, rotates and appends, in the emulator, against torch's steps on a CPU."""

from __future__ import annotations

import pytest
import torch
from cuda_emulator import emulated_gpu

from strobe.ops import cache, rope
from strobe.ops.embedding import embed


@pytest.mark.parametrize(
    ("kv_dtype", "early"), [(torch.bfloat16, True), (torch.float8_e4m3fn, False)], ids=["early", "float8"]
)
@pytest.mark.parametrize(
    ("tokens", "q_heads", "kv_heads", "head_dim"),
    [(1, 8, 2, 128), (2, 24, 5, 128), (7, 5, 5, 64), (3, 3, 1, 80)],
)
def test_norms_rotates_and_appends(
    tokens: int, q_heads: int, kv_heads: int, head_dim: int, kv_dtype: torch.dtype, early: bool
) -> None:
    torch.manual_seed(tokens)
    fused = (2 * torch.randn(tokens, q_heads + 2 * kv_heads, head_dim)).bfloat16()
    qk, v = fused.split_with_sizes((q_heads + kv_heads, kv_heads), 1)
    frequencies = [1e4 ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    turn = rope.angles(torch.randint(9999, (tokens,)), rope.signed(frequencies, "cpu"), torch.bfloat16)
    norms = cache.HeadNorms(*((torch.rand(2, head_dim) + 0.5).bfloat16()), 1e-6)
    slots = torch.randperm(5 * 4)[:tokens]
    scales = (torch.rand(kv_heads) + 0.1, torch.rand(kv_heads) + 0.1) if kv_dtype.itemsize == 1 else None
    stored = torch.zeros(2, 2, 5, 4, kv_heads, head_dim).to(kv_dtype)  # by torch, by the kernel
    wide = cache.HeadNorms(norms.q.float(), norms.k.float(), norms.eps)
    normed = [
        cache.rms_norm(x.float(), w, wide.eps)
        for x, w in ((qk[:, :q_heads], wide.q), (qk[:, q_heads:], wide.k))
    ]
    q = cache.append_rotated(
        torch.cat(normed, 1).bfloat16(),
        v,
        turn,
        stored[0, 0],
        stored[0, 1],
        slots,
        cache.Options(scales=scales),
    )
    with emulated_gpu():
        q_kernel = cache.append_rotated(
            qk, v, turn, stored[1, 0], stored[1, 1], slots, cache.Options(norms, scales, early)
        )
    torch.testing.assert_close(q_kernel.float(), q.float(), rtol=2**-6, atol=2**-6)
    rtol = 0.13 if scales else 2**-6  # a neighbouring float8 at most
    torch.testing.assert_close(stored[1].float(), stored[0].float(), rtol=rtol, atol=2**-6)


def test_waits_for_angles_of_the_launch_just_ahead() -> None:
    tokens, q_heads, kv_heads, head_dim = 3, 4, 2, 64
    fused = torch.randn(tokens, q_heads + 2 * kv_heads, head_dim).bfloat16()
    qk, v = fused.split_with_sizes((q_heads + kv_heads, kv_heads), 1)
    signed = rope.signed([1e4 ** (-2 * i / head_dim) for i in range(head_dim // 2)], "cpu")
    table, ids = torch.randn(9, 128).bfloat16(), torch.randint(9, (tokens,))
    positions = torch.randint(99, (tokens,))
    stored = torch.zeros(2, 2, 2, 4, kv_heads, head_dim).bfloat16()  # by torch, by the kernel
    slots = torch.randperm(2 * 4)[:tokens]
    want = cache.append_rotated(qk, v, embed(ids, table, positions, signed)[1], *stored[0], slots)
    with emulated_gpu():
        got = cache.append_rotated(qk, v, embed(ids, table, positions, signed)[1], *stored[1], slots)
    torch.testing.assert_close(got.float(), want.float(), rtol=2**-6, atol=2**-6)
    torch.testing.assert_close(stored[1].float(), stored[0].float(), rtol=2**-6, atol=2**-6)
