"""The cache's operations on a CPU; tests/gpu/test_cache_ops.py compares the kernels with these."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from strobe.ops import cache, pages, rope
from strobe.ops.norm import rms_norm_reference


@given(
    tokens=st.integers(1, 9),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    normed=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_append_rotated_is_norm_then_rope_then_append(
    tokens: int, kv_heads: int, group: int, normed: bool, seed: int
) -> None:
    rng = torch.Generator().manual_seed(seed)
    q_heads, frequencies = kv_heads * group, [1.0, 0.3, 0.01, 1e-4]
    qk = torch.randn(tokens, q_heads + kv_heads, 8, generator=rng)
    v = torch.randn(tokens, kv_heads, 8, generator=rng)
    positions, slots = (
        torch.randint(5000, (tokens,), generator=rng),
        torch.randperm(12, generator=rng)[:tokens],
    )
    stored = torch.zeros(2, 3, 4, kv_heads, 8)
    turn = rope.angles(positions, rope.signed(frequencies, "cpu"), qk.dtype)
    norms = cache.HeadNorms(*torch.rand(2, 8, generator=rng), 1e-5) if normed else None
    q = cache.append_rotated(qk, v, turn, stored[0], stored[1], slots, cache.Options(norms))
    if norms is not None:
        weights = (norms.q, norms.k)
        parts = zip(qk.split_with_sizes((q_heads, kv_heads), 1), weights, strict=True)
        qk = torch.cat([rms_norm_reference(x, weight, norms.eps) for x, weight in parts], 1)
    expected = rope.rotate_reference(qk, positions, frequencies)
    torch.testing.assert_close(q, expected[:, :q_heads], atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(stored[0].flatten(0, 1)[slots], expected[:, q_heads:], atol=1e-3, rtol=1e-4)
    assert torch.equal(stored[1].flatten(0, 1)[slots], v)


def test_a_float8_cache_holds_quotients_and_saturates() -> None:
    k, v = torch.tensor([[[1.0, -3.0]]]), torch.tensor([[[1e6, -1e6]]])
    stored = torch.zeros(2, 2, 1, 1, 2).to(torch.float8_e4m3fn)
    scales = torch.tensor([0.5]), torch.tensor([1.0])
    cache.append(k, v, stored[0], stored[1], torch.tensor([1]), cache.Options(scales=scales))
    assert stored[0].float().flatten().tolist() == [0.0, 0.0, 2.0, -6.0]
    assert stored[1].float().flatten().tolist() == [0.0, 0.0, 448.0, -448.0]


def test_pages_are_copied_in_all_layers_and_gathered_in_order() -> None:
    k, v = torch.randn(2, 2, 5, 3, 1, 4)
    was = k.clone()
    pages.copy_pages(k, v, torch.tensor([0, 3]), torch.tensor([4, 1]))
    assert torch.equal(k[:, [4, 1]], was[:, [0, 3]])
    assert torch.equal(k[:, [0, 2, 3]], was[:, [0, 2, 3]])
    assert torch.equal(pages.gather_pages(k[0], torch.tensor([2, 2])), was[0, 2].repeat(2, 1, 1))
