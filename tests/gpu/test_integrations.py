"""Other people's signatures on a GPU, against the same calls on a CPU, and torch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from strobe.integrations import flash_attn as fa
from strobe.integrations.sdpa import redirect, scaled_dot_product_attention

pytestmark = pytest.mark.gpu


def close(given: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(given.float().cpu(), expected.float().cpu(), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("q_len", [1, 3, 40])
def test_cache_is_appended_to_and_read(q_len: int, paged: bool) -> None:
    lengths = torch.tensor([70, 0, 130], dtype=torch.int32)
    shape = (40, 16, 2, 128) if paged else (5, 192, 2, 128)
    caches = torch.randn(2, *shape).bfloat16()
    where = {"cache_batch_idx": torch.tensor([3, 0, 1], dtype=torch.int32)}
    if paged:
        where = {"block_table": torch.randperm(40)[:36].view(3, 12).int()}
    q, k, v = torch.randn(3, q_len, 8, 128), *torch.randn(2, 3, q_len, 2, 128)
    angles = torch.randn(200, 32)
    outs, written = [], []
    for device in ("cpu", "cuda"):
        k_cache, v_cache = caches.clone().to(device)
        new = [x.bfloat16().to(device) for x in (q, k, v)]
        on = {name: index.to(device) for name, index in where.items()}
        outs.append(
            fa.flash_attn_with_kvcache(
                new[0], k_cache, v_cache, *new[1:], angles.cos().to(device), angles.sin().to(device),
                cache_seqlens=lengths.to(device), causal=True, **on,
            )
        )  # fmt: skip
        written.append((k_cache, v_cache))
    close(outs[1], outs[0])
    for cpu, gpu in zip(*written, strict=True):
        close(gpu, cpu)


def test_a_graph_of_a_call_follows_lengths_and_pages() -> None:
    """Captured once, replayed for other queries, new keys, lengths and pages."""
    caches = torch.randn(2, 40, 16, 2, 128).bfloat16()
    angles = torch.randn(200, 64)

    def fresh() -> list[torch.Tensor]:
        new = [torch.randn(3, 1, heads, 128).bfloat16() for heads in (8, 2, 2)]
        return [*new, torch.randint(0, 190, (3,)).int(), torch.randperm(40)[:36].view(3, 12).int()]

    def call(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        lengths: torch.Tensor,
        table: torch.Tensor,
        *at: Any,
    ) -> torch.Tensor:
        cache, cos, sin = at
        return fa.flash_attn_with_kvcache(
            q, *cache, k, v, cos, sin, cache_seqlens=lengths, block_table=table, causal=True
        )

    held, on_gpu = [x.cuda() for x in fresh()], caches.cuda()
    turn = angles.cos(), angles.sin()
    turn_on_gpu = [x.cuda() for x in turn]
    call(*held, on_gpu, *turn_on_gpu)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(*held, on_gpu, *turn_on_gpu)
    for _ in range(3):
        given = fresh()
        for place, value in zip(held, given, strict=True):
            place.copy_(value)
        on_gpu.copy_(caches)
        graph.replay()
        on_cpu = caches.clone()
        close(out, call(*given, on_cpu, *turn))
        close(on_gpu, on_cpu)


def test_a_contiguous_cache_in_a_graph_first() -> None:
    """What the capture makes of page tables holds no numbers until it is replayed."""
    caches, q = torch.randn(2, 4, 1040, 2, 128).bfloat16(), torch.randn(3, 1, 8, 128).bfloat16()
    lengths = torch.randint(1, 1040, (3,)).int()
    on_gpu, held = caches.cuda(), (q.cuda(), lengths.cuda())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fa.flash_attn_with_kvcache(held[0], *on_gpu, cache_seqlens=held[1])
    eager = fa.flash_attn_with_kvcache(held[0], *on_gpu, cache_seqlens=held[1])
    close(eager, fa.flash_attn_with_kvcache(q, *caches, cache_seqlens=lengths))
    graph.replay()
    assert torch.equal(out, eager)


def test_varlen_with_a_block_table() -> None:
    q, (k, v) = torch.randn(41, 8, 64).bfloat16(), torch.randn(2, 30, 16, 2, 64).bfloat16()
    sums = torch.tensor([0, 40, 41], dtype=torch.int32), torch.tensor([0, 100, 177], dtype=torch.int32)
    table = torch.randperm(30)[:14].view(2, 7).int()
    outs = [
        fa.flash_attn_varlen_func(
            *(x.to(device) for x in (q, k, v, *sums)), 40, 100, causal=True, block_table=table.to(device)
        )
        for device in ("cpu", "cuda")
    ]
    close(outs[1], outs[0])


@pytest.mark.parametrize("mask", ["none", "causal", "bool", "additive"])
def test_torchs_attention(mask: str) -> None:
    q = torch.randn(2, 8, 70, 128, device="cuda").bfloat16()
    k, v = torch.randn(2, 2, 2, 90, 128, device="cuda").bfloat16()
    given: dict[str, object] = {"enable_gqa": True, "is_causal": mask == "causal"}
    if mask == "bool":
        given["attn_mask"] = torch.rand(70, 90, device="cuda") < 0.7
    if mask == "additive":
        given["attn_mask"] = torch.randn(2, 1, 70, 90, device="cuda").bfloat16()
    expected = F.scaled_dot_product_attention(q, k, v, **given)
    close(scaled_dot_product_attention(q, k, v, **given), expected)
    with redirect() as mode:
        close(F.scaled_dot_product_attention(q, k, v, **given), expected)
    assert (mode.taken, mode.passed_on) == (1, 0)
