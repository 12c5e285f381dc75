"""The projection that rotates and appends its heads on a GPU, alone and in a chain of layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from append_cases import FP8, KINDS, Heads, draw

from strobe.attention.problem import Paged
from strobe.cuda.launch import Launch
from strobe.models.batch import Batch, KvTensors
from strobe.models.shapes import named, random_model

pytestmark = pytest.mark.gpu

MODELS: list[tuple[Heads, int, int, dict[str, Any]]] = [
    *((Heads(32, 8, 128), tokens, 16, {"inputs": 4096, "normed": True}) for tokens in (1, 2, 4, 8, 11, 16)),
    (Heads(32, 32, 128), 1, 16, {"inputs": 4096, "normed": True}),
    (Heads(32, 8, 64), 1, 16, {"inputs": 2048, "normed": True}),
    (Heads(28, 4, 128), 3, 16, {"inputs": 3584, "normed": True, "biased": True}),
    (Heads(32, 8, 128), 2, 16, {"inputs": 4096, "kv_dtype": FP8, "scaled": True}),
]


@pytest.mark.parametrize(("heads", "tokens", "page_size", "kind"), KINDS + MODELS, ids=str)
def test_equals_the_formula(heads: Heads, tokens: int, page_size: int, kind: dict[str, Any]) -> None:
    if kind.get("kv_dtype") == FP8 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("float8 needs compute capability 8.9")
    case = draw(heads, tokens, page_size, device="cuda", **kind)
    first = case.projection.append(case.x, case.to, "cuda_skinny")
    case.check(first)
    case.to.k_pages.copy_(case.before[0]), case.to.v_pages.copy_(case.before[1])
    again = case.projection.append(case.x, case.to, "cuda_skinny")  # the launch that starts ahead of its turn
    case.check(again)
    assert torch.equal(first, again)


@pytest.mark.parametrize("attention", ["auto", "cuda_paged", "cuda_cluster"])
@pytest.mark.parametrize("lengths", [(1,), (700,), (17, 1, 900, 64)], ids=str)
def test_a_chain_of_layers_equals_its_steps(
    lengths: tuple[int, ...], attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention that starts before the projection ahead has written its keys reads none of them too early,
    also where what lay there before was not a number."""
    if torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("kernels start ahead of their turn from compute capability 9.0 on")
    config = replace(named("llama3.2-1b"), layers=6, hidden=512, intermediate=768, vocab_size=1000)
    model = random_model(config, device="cuda", dtype=torch.bfloat16)
    rows, pages = len(lengths), 64
    kv_cache = KvTensors.allocate(config, rows * pages, 16, dtype=torch.bfloat16, device="cuda")
    before = torch.randn_like(kv_cache.k), torch.randn_like(kv_cache.v)
    table = torch.randperm(rows * pages, device="cuda").int().view(rows, pages)
    lens = torch.tensor(lengths, device="cuda")
    slots = table.gather(1, (lens[:, None] - 1) // 16).squeeze(1).long() * 16 + (lens - 1) % 16
    for each in before:
        each.flatten(1, 2)[:, slots] = float("nan")
    layout = Paged(table, lens.int(), max_kv_len=1024, settled=True)
    ids, at = torch.arange(rows, device="cuda"), torch.arange(rows, device="cuda")
    batch = Batch(ids, lens - 1, slots, layout, at, kv_cache, attention, "cuda_skinny")

    def fresh() -> None:
        kv_cache.k.copy_(before[0]), kv_cache.v.copy_(before[1])
        torch.cuda.synchronize()  # `settled` promises that older keys are long written

    start = Launch.__call__

    def one_after_another(launch: Launch, *args: Any) -> None:
        start(launch, *args)
        torch.cuda.synchronize()

    with torch.inference_mode():
        fresh()
        model(batch)  # which loads all
        with monkeypatch.context() as patch:
            patch.setattr(Launch, "__call__", one_after_another)
            fresh()
            want = model(batch)
        cached = kv_cache.k.clone(), kv_cache.v.clone()
        assert want.isfinite().all()
        for _ in range(20):
            fresh()
            assert torch.equal(model(batch), want)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(batch)
        for _ in range(20):
            fresh()
            graph.replay()
            assert torch.equal(out, want)
        assert torch.equal(kv_cache.k, cached[0])
        assert torch.equal(kv_cache.v, cached[1])


def test_it_is_what_a_product_and_an_append_behind_it_are() -> None:
    """But for queries, keys and values that are not rounded on the way."""
    case = draw(Heads(32, 8, 128), 5, 16, device="cuda", inputs=4096, normed=True, biased=True)
    q, fused = case.projection.append(case.x, case.to, "cuda_skinny"), case.to.k_pages.clone()
    q_behind = case.projection.append(case.x, case.to, "torch_linear")
    torch.testing.assert_close(q, q_behind, rtol=2**-6, atol=2**-5)
    torch.testing.assert_close(fused, case.to.k_pages, rtol=2**-6, atol=2**-5)
