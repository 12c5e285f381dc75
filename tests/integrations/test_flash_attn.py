"""FlashAttention's signatures over strobe, against plain float64 PyTorch."""

from __future__ import annotations

import inspect
import random
import threading
from typing import Any

import pytest
import torch

from strobe.errors import ProblemError
from strobe.integrations import flash_attn as fa


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """One row: q `[q_len, heads, dim]`, k and v `[kv_len, kv_heads, dim]`."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) * q.shape[-1] ** -0.5
    if causal:
        hidden = torch.ones(q.shape[0], k.shape[0], dtype=torch.bool).triu(k.shape[0] - q.shape[0] + 1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1).nan_to_num(0.0), v).to(q.dtype)


@pytest.mark.parametrize("causal", [False, True])
def test_fixed_length(causal: bool) -> None:
    q, k, v = torch.randn(2, 9, 4, 16), torch.randn(2, 13, 2, 16), torch.randn(2, 13, 2, 16)
    out = fa.flash_attn_func(q, k, v, causal=causal)
    for row in range(2):
        torch.testing.assert_close(out[row], reference(q[row], k[row], v[row], causal), atol=2e-6, rtol=0)
    again, lse, probabilities = fa.flash_attn_func(q, k, v, causal=causal, return_attn_probs=True)
    torch.testing.assert_close(again, out, atol=2e-6, rtol=0)
    assert lse.shape == (2, 4, 9)
    assert probabilities is None


@pytest.mark.parametrize("paged", [False, True])
def test_varlen(paged: bool) -> None:
    q_lens, kv_lens = [3, 1, 8], [5, 11, 8]
    cu_q = torch.tensor([0, 3, 4, 12], dtype=torch.int32)
    cu_k = torch.tensor([0, 5, 16, 24], dtype=torch.int32)
    q, k, v = torch.randn(12, 4, 8), torch.randn(24, 2, 8), torch.randn(24, 2, 8)
    k_in, v_in, table = k, v, None
    if paged:
        table = torch.tensor([[5, 6, 0], [2, 4, 1], [0, 3, 0]], dtype=torch.int32)
        k_in, v_in = torch.randn(2, 7, 4, 2, 8)
        for row in range(3):
            for at in range(kv_lens[row]):
                page, slot = int(table[row, at // 4]), at % 4
                k_in[page, slot], v_in[page, slot] = k[cu_k[row] + at], v[cu_k[row] + at]
    out = fa.flash_attn_varlen_func(q, k_in, v_in, cu_q, cu_k, 8, 11, causal=True, block_table=table)
    for row in range(3):
        at_q, at_k = slice(cu_q[row], cu_q[row] + q_lens[row]), slice(cu_k[row], cu_k[row] + kv_lens[row])
        torch.testing.assert_close(out[at_q], reference(q[at_q], k[at_k], v[at_k], True), atol=2e-6, rtol=0)


def rotate(
    x: torch.Tensor, position: int, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    """x `[heads, dim]`: pairs of numbers turned as complex numbers."""
    half = cos.shape[1]
    pairs = (
        (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
        if interleaved
        else (slice(0, half), slice(half, 2 * half))
    )
    turned = torch.complex(x[:, pairs[0]], x[:, pairs[1]]) * torch.complex(cos[position], sin[position])
    out = x.clone()
    out[:, pairs[0]], out[:, pairs[1]] = turned.real, turned.imag
    return out


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("kv_max", [24, 25])
def test_cache_is_appended_to_and_read(interleaved: bool, kv_max: int) -> None:
    lengths = torch.tensor([4, 0, 20], dtype=torch.int32)
    rows = torch.tensor([3, 0, 1])
    caches = torch.randn(2, 5, kv_max, 2, 8)
    k_cache, v_cache = caches.clone()
    q, k, v = torch.randn(3, 2, 4, 8), torch.randn(3, 2, 2, 8), torch.randn(3, 2, 2, 8)
    angles = torch.randn(30, 3)
    cos, sin = angles.cos(), angles.sin()
    out = fa.flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cos, sin, cache_seqlens=lengths, cache_batch_idx=rows, causal=True,
        rotary_interleaved=interleaved,
    )  # fmt: skip
    for i, row in enumerate(rows.tolist()):
        n = int(lengths[i])
        keys = torch.stack([rotate(k[i, j], n + j, cos, sin, interleaved) for j in range(2)])
        queries = torch.stack([rotate(q[i, j], n + j, cos, sin, interleaved) for j in range(2)])
        torch.testing.assert_close(k_cache[row, n : n + 2], keys, atol=1e-6, rtol=0)
        torch.testing.assert_close(v_cache[row, n : n + 2], v[i])
        torch.testing.assert_close(k_cache[row, :n], caches[0, row, :n])
        expected = reference(queries, k_cache[row, : n + 2], v_cache[row, : n + 2], True)
        torch.testing.assert_close(out[i], expected, atol=3e-6, rtol=0)
    untouched = [2, 4]
    torch.testing.assert_close(k_cache[untouched], caches[0, untouched])


@pytest.mark.parametrize(("causal", "window"), [(False, (-1, -1)), (False, (4, 0)), (True, (4, -1))])
def test_where_queries_are_rotated_to(causal: bool, window: tuple[int, int]) -> None:
    """At their own positions where some key is hidden, else all at cache_seqlens."""
    lengths = torch.tensor([4, 0, 13], dtype=torch.int32)
    k_cache, v_cache = torch.randn(2, 3, 16, 2, 8)
    q, k, v = torch.randn(3, 3, 4, 8), torch.randn(3, 3, 2, 8), torch.randn(3, 3, 2, 8)
    angles = torch.randn(16, 4)
    cos, sin = angles.cos(), angles.sin()
    out = fa.flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cos, sin, lengths, causal=causal, window_size=window, num_splits=3
    )
    for row, n in enumerate(lengths.tolist()):
        keys, values = k_cache[row, : n + 3], v_cache[row, : n + 3]
        if window == (-1, -1):
            turned = torch.stack([rotate(one, n, cos, sin, True) for one in q[row]])
            expected = reference(turned, keys, values, False)
        else:
            turned = [rotate(one, n + i, cos, sin, True) for i, one in enumerate(q[row])]
            seen = [slice(max(0, n + i - 4), n + i + 1) for i in range(3)]
            rows = zip(turned, seen, strict=True)
            expected = torch.cat([reference(one[None], keys[s], values[s], False) for one, s in rows])
        torch.testing.assert_close(out[row], expected, atol=3e-6, rtol=0)


def test_slices_of_a_longer_cache() -> None:
    """Rows of a slice lie further apart than they are long; a head-major cache is no run of pages at all."""
    whole = torch.randn(2, 3, 96, 2, 8)
    head_major = torch.randn(2, 3, 2, 64, 8).transpose(2, 3)
    lengths = torch.tensor([17, 0, 61], dtype=torch.int32)
    q, k, v = torch.randn(3, 2, 4, 8), torch.randn(3, 2, 2, 8), torch.randn(3, 2, 2, 8)
    for k_cache, v_cache in (
        whole[:, :, :64],
        whole[:, 1:, 32:],
        head_major,
        (whole[0, :, :64], head_major[1]),
        whole[:, :1, :63],
    ):
        rows = torch.randperm(k_cache.shape[0])
        before = k_cache.clone()
        n = lengths[: len(rows)]
        new = (q, k, v) if len(rows) == 3 else (q[: len(rows)], k[: len(rows)], v[: len(rows)])
        out = fa.flash_attn_with_kvcache(
            new[0], k_cache, v_cache, *new[1:], cache_seqlens=n, cache_batch_idx=rows, causal=True
        )
        for i, row in enumerate(rows.tolist()):
            end = int(n[i]) + 2
            torch.testing.assert_close(k_cache[row, end - 2 : end], k[i])
            torch.testing.assert_close(v_cache[row, end - 2 : end], v[i])
            torch.testing.assert_close(k_cache[row, end:], before[row, end:])
            expected = reference(q[i], k_cache[row, :end], v_cache[row, :end], True)
            torch.testing.assert_close(out[i], expected, atol=2e-6, rtol=0)


def test_the_first_rows_of_several_caches() -> None:
    """Calls in turn over caches of other sizes, some with more rows than queries."""
    calls = [(batch, stored, kv_max) for batch in (1, 3) for stored in (3, 5) for kv_max in (24, 25, 32)]
    for batch, stored, kv_max in random.sample(2 * calls, 2 * len(calls)):
        k_cache, v_cache = torch.randn(2, stored, kv_max, 2, 8)
        q, lengths = torch.randn(batch, 2, 4, 8), torch.randint(2, kv_max + 1, (batch,)).int()
        out = fa.flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=lengths, causal=True)
        for row, n in enumerate(lengths.tolist()):
            expected = reference(q[row], k_cache[row, :n], v_cache[row, :n], True)
            torch.testing.assert_close(out[row], expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_calls_over_one_cache_have_their_own_lengths(mode: Any) -> None:
    """They share a layout, whose lengths each call writes anew; threads do not share it."""
    k_cache, v_cache = torch.randn(2, 3, 40, 2, 8)
    wrong: list[str] = []

    def decode() -> None:
        k_own, v_own = k_cache.clone(), v_cache.clone()
        with mode():
            for _ in range(12):
                q, k, v = torch.randn(3, 1, 4, 8), torch.randn(3, 1, 2, 8), torch.randn(3, 1, 2, 8)
                lengths = torch.randint(0, 40, (3,)).int()
                new = (k, v) if random.random() < 0.5 else (None, None)
                out = fa.flash_attn_with_kvcache(q, k_own, v_own, *new, cache_seqlens=lengths, causal=True)
                for row, n in enumerate(lengths.tolist()):
                    end = n + (new[0] is not None)
                    expected = reference(q[row], k_own[row, :end], v_own[row, :end], True)
                    if not torch.allclose(out[row], expected, atol=2e-6, rtol=0):
                        wrong.append(f"row {row} of length {end}")

    decode()
    threads = [threading.Thread(target=decode) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_gradients_know_the_lengths_of_their_call() -> None:
    k_cache, v_cache = torch.randn(2, 1, 20, 2, 8)
    q = torch.randn(1, 1, 4, 8, requires_grad=True)
    first = fa.flash_attn_with_kvcache(
        q, k_cache, v_cache, cache_seqlens=torch.tensor([7], dtype=torch.int32)
    )
    with torch.no_grad():
        fa.flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=torch.tensor([19], dtype=torch.int32))
    (found,) = torch.autograd.grad(first.sum(), q)
    (wanted,) = torch.autograd.grad(reference(q[0], k_cache[0, :7], v_cache[0, :7], False).sum(), q)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_paged_cache() -> None:
    table = torch.tensor([[3, 1], [0, 2]], dtype=torch.int32)
    k_pages, v_pages = torch.randn(2, 4, 16, 1, 8)
    q, lengths = torch.randn(2, 1, 4, 8), torch.tensor([5, 30], dtype=torch.int32)
    out, lse = fa.flash_attn_with_kvcache(
        q, k_pages, v_pages, cache_seqlens=lengths, block_table=table, return_softmax_lse=True
    )
    assert lse.shape == (2, 4, 1)
    for row in range(2):
        k, v = (pages[table[row].long()].flatten(0, 1)[: lengths[row]] for pages in (k_pages, v_pages))
        torch.testing.assert_close(out[row], reference(q[row], k, v, False), atol=2e-6, rtol=0)


def test_what_is_missing_is_refused_by_name() -> None:
    x = torch.randn(1, 4, 2, 8)
    with pytest.raises(ProblemError, match=r"dropout_p is 0.1"):
        fa.flash_attn_func(x, x, x, dropout_p=0.1)
    with pytest.raises(ProblemError, match="alibi_slopes"):
        fa.flash_attn_func(x, x, x, alibi_slopes=torch.ones(2))
    with pytest.raises(ProblemError, match="cache_leftpad"):
        fa.flash_attn_with_kvcache(x, x, x, cache_leftpad=torch.zeros(1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cache_seqlens": None}, "k and v without cache_seqlens"),
        ({"v": None}, "one of k and v"),
        ({"rotary_cos": torch.ones(20, 4)}, "one of k and v, or of rotary_cos and rotary_sin"),
        (
            {"k": None, "v": None, "rotary_cos": torch.ones(20, 4), "rotary_sin": torch.ones(20, 4)},
            "without k",
        ),
        (
            {"rotary_cos": torch.ones(20, 5), "rotary_sin": torch.ones(20, 5)},
            r"supported: \[positions, up to 4\]",
        ),
        ({"rotary_cos": torch.ones(5, 4), "rotary_sin": torch.ones(5, 4)}, "have 5 positions; the last is 5"),
        ({"k": torch.ones(2, 3, 1, 8)}, r"k is \[2, 3, 1, 8\].*supported: \[2, new_len, 2, 8\] both"),
        ({"k": torch.ones(1, 3, 2, 8), "v": torch.ones(1, 3, 2, 8)}, r"k is \[1, 3, 2, 8\]"),
        (
            {"cache_seqlens": torch.ones(1, dtype=torch.int32)},
            r"cache_seqlens is torch.int32 \[1\] on cpu; supported: torch.int32 or torch.int64 \[2\] on cpu",
        ),
        ({"cache_seqlens": torch.ones(2)}, r"cache_seqlens is torch.float32"),
        ({"cache_seqlens": [3, 3]}, "cache_seqlens is list"),
        ({"cache_seqlens": torch.ones(2, dtype=torch.int32, device="meta")}, "on meta; supported: .* on cpu"),
        ({"cache_batch_idx": torch.ones(2)}, r"cache_batch_idx is torch.float32 \[2\]"),
        ({"cache_batch_idx": torch.tensor([1])}, r"cache_batch_idx is torch.int64 \[1\]"),
        (
            {"block_table": torch.zeros(2, 1).long()},
            r"block_table is torch.int64 .* torch.int32 \[2, pages\]",
        ),
        ({"block_table": torch.zeros(2).int()}, r"block_table is torch.int32 \[2\]"),
        ({"v_cache": torch.zeros(2, 8, 2, 8)}, r"v_cache \[2, 8, 2, 8\]; supported: .* equal caches"),
        ({"q": torch.zeros(3, 4, 8)}, r"q is \[3, 4, 8\]"),
    ],
)
def test_what_does_not_fit_the_cache_is_refused(changes: dict[str, object], message: str) -> None:
    cache = torch.zeros(2, 2, 16, 2, 8)
    q, k, v = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 2, 8), torch.randn(2, 3, 2, 8)
    given = {"q": q, "k_cache": cache[0], "v_cache": cache[1], "k": k, "v": v, "cache_seqlens": 3}
    with pytest.raises(ProblemError, match=message):
        fa.flash_attn_with_kvcache(**given | changes)
    assert not cache.any()


def test_signatures_are_flash_attns() -> None:
    """Names, order and defaults of flash_attn 2.8, so that calls by position and by name both fit."""
    options = (
        "dropout_p=0.0 softmax_scale=None causal=False window_size=(-1,-1) softcap=0.0 alibi_slopes=None"
    )
    last = "deterministic=False return_attn_probs=False"
    lengths = "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k"
    signatures = {
        fa.flash_attn_func: f"q k v {options} {last}",
        fa.flash_attn_varlen_func: f"q k v {lengths} {options} {last} block_table=None",
        fa.flash_attn_with_kvcache: "q k_cache v_cache k=None v=None rotary_cos=None rotary_sin=None "
        "cache_seqlens=None cache_batch_idx=None cache_leftpad=None block_table=None softmax_scale=None "
        "causal=False window_size=(-1,-1) softcap=0.0 rotary_interleaved=True alibi_slopes=None num_splits=0 "
        "return_softmax_lse=False",
    }
    for function, expected in signatures.items():
        given = [
            name if p.default is p.empty else f"{name}={p.default}".replace(" ", "")
            for name, p in inspect.signature(function).parameters.items()
        ]
        assert given == expected.split()


@pytest.mark.parametrize(
    ("lens", "pages"), [([16, 3], [0, 1]), ([-1, 3], [0, 1]), ([5, 3], [2, 1]), ([5, 3], [0, -1])]
)
def test_new_keys_stay_in_their_pages(lens: list[int], pages: list[int]) -> None:
    cache = torch.zeros(2, 2, 16, 2, 8)
    q, k, v = torch.randn(3, 2, 1, 2, 8)
    table, seq_lens = (torch.tensor(values, dtype=torch.int32) for values in (pages, lens))
    with pytest.raises(ProblemError, match=r"cache_seqlens|block_table"):
        fa.flash_attn_with_kvcache(q, *cache, k, v, cache_seqlens=seq_lens, block_table=table[:, None])
    assert not cache.any()


def test_loose_types_are_taken_as_flash_attn_takes_them() -> None:
    q, sums = torch.randn(10, 2, 8), torch.tensor([0, 4, 10], dtype=torch.int32)
    strict = fa.flash_attn_varlen_func(q, q, q, sums, sums, 6, 6, causal=True, window_size=(2, 0))
    longest = torch.tensor(6)
    loose = fa.flash_attn_varlen_func(q, q, q, sums, sums, longest, longest, causal=1, window_size=[2, 0])
    assert torch.equal(strict, loose)


def test_what_is_not_contiguous_is_copied_as_flash_attn_copies_it() -> None:
    q, k, v = (torch.randn(2, 8, 4, 7).transpose(1, 3) for _ in range(3))
    expected = fa.flash_attn_func(*(x.contiguous() for x in (q, k, v)), causal=True)
    assert torch.equal(fa.flash_attn_func(q, k, v, causal=True), expected)
    sums = torch.tensor([0, 7], dtype=torch.int32)
    packed = fa.flash_attn_varlen_func(q[0], k[0], v[0], sums, sums, 7, 7, causal=True)
    torch.testing.assert_close(packed, expected[0], atol=2e-6, rtol=0)
    cached = fa.flash_attn_with_kvcache(q, k.contiguous(), v.contiguous(), causal=True)
    torch.testing.assert_close(cached, expected, atol=2e-6, rtol=0)


def test_a_traced_call_appends_to_its_cache() -> None:
    caches, lengths = torch.randn(2, 2, 16, 2, 8), torch.tensor([3, 11], dtype=torch.int32)
    q, k, v = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 2, 8), torch.randn(2, 3, 2, 8)

    def step(k_cache: torch.Tensor, v_cache: torch.Tensor) -> torch.Tensor:
        return fa.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=lengths, causal=True)

    eager, traced = caches.clone(), caches.clone()
    given = torch.compile(step, backend="eager", fullgraph=True)(*traced)
    torch.testing.assert_close(given, step(*eager))
    assert torch.equal(traced, eager)
    assert not torch.equal(traced, caches)
