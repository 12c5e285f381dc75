"""What a network tells that it will compile is what it compiles."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from cuda_emulator import emulated_gpu
from small_llama import CONFIG

from strobe.attention import api, ladder
from strobe.attention.problem import Options, Paged
from strobe.cuda import jit
from strobe.linear import projection
from strobe.models import shapes
from strobe.models.network import decode_attention, products
from strobe.ops import cache


def destination(tokens: int) -> cache.Destination:
    turn = torch.zeros(2, tokens, 1, CONFIG.head_dim).bfloat16()
    pages = torch.zeros(2, 1, 4, CONFIG.kv_heads, CONFIG.head_dim).bfloat16()
    return cache.Destination((turn[0], turn[1]), pages[0], pages[1], torch.arange(tokens), cache.Options())


@contextmanager
def noted() -> Iterator[list[jit.Source]]:
    """What is compiled meanwhile."""
    kernel, compiled = jit.kernel, []

    def note(
        source: Path, entry: str, defines: Mapping[str, jit.Define] | None = None, device: int = 0
    ) -> Any:
        compiled.append(jit.Source(source, defines or {}))
        return kernel(source, entry, defines, device)

    with patch.object(jit, "kernel", note):
        yield compiled


@pytest.mark.parametrize("tokens", [1, 3])
def test_products_compile_what_they_tell(tokens: int) -> None:
    def gpu_weight(outputs: int, inputs: int, **_: object) -> torch.Tensor:
        return torch.empty(outputs, inputs, dtype=torch.bfloat16)

    with patch.object(projection, "empty_weight", gpu_weight):
        model = shapes.random_model(CONFIG, device="cpu", dtype=torch.bfloat16)
    found = products(model)
    assert [(residual, heads is not None) for _, residual, heads in found] == [
        *((False, True), (True, False), (False, False), (True, False), (False, False))
    ]
    for each, residual, heads in found:
        with emulated_gpu(sm_count=3):
            told = each.source(tokens, residual=residual, append=heads)
            x = torch.randn(tokens, each.weight.shape[1]).bfloat16()
            out = torch.zeros(tokens, len(each.weight)).bfloat16() if residual else None
            with noted() as compiled:
                if heads is None:
                    each(x, residual=out)
                else:
                    each.append(x, destination(tokens))
        assert told in compiled


@pytest.mark.parametrize("rows", [2, 70])
def test_decode_attention_compiles_what_it_tells(rows: int) -> None:
    """As an H200's 132 SMs have it: what is told ahead is for that many."""
    model = shapes.random_model(CONFIG, device="cpu", dtype=torch.bfloat16)
    q = torch.randn(rows, 1, CONFIG.q_heads, CONFIG.head_dim).bfloat16()
    k, v = torch.randn(2, 3, 16, CONFIG.kv_heads, CONFIG.head_dim).bfloat16()
    lens = torch.randint(1, 33, (rows,), dtype=torch.int32)
    table = torch.randint(3, (rows, 2), dtype=torch.int32)
    layout = Paged(table, lens, max_kv_len=32, settled=True)
    on_gpu = patch.object(model, "device", torch.device("cuda"))
    with on_gpu, emulated_gpu(sm_count=132):
        problem = decode_attention(model, rows, 32, 16)
        told = ladder.choose(problem, "cuda_paged").source(problem)
        with noted() as compiled:
            api.run(q, k, v, "cuda_paged", Options(causal=True, layout=layout))
    assert told in compiled
