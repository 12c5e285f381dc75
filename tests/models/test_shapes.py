"""Published sizes: as many weights as their makers count; random networks keep their activations' scale."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from strobe.bench.verify import logits
from strobe.errors import UnknownNameError
from strobe.models import shapes
from strobe.models.network import allocate, tensors


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [
        ("llama2-7b", 6_738_415_616),
        ("llama3-8b", 8_030_261_248),
        ("llama3.2-1b", 1_235_814_400),
        ("llama3.2-3b", 3_212_749_824),
        ("mistral-7b", 7_241_732_096),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen3-8b", 8_190_735_360),
        ("gpt2", 124_439_808),
    ],
)
def test_counts_of_the_makers(shape: str, parameters: int) -> None:
    config = shapes.named(shape)
    held = allocate(config, device="meta", dtype=torch.bfloat16)
    assert sum(t.numel() for t in tensors(held)) == parameters
    assert shapes.weight_bytes(config, torch.bfloat16) == 2 * parameters


def test_unknown_shape_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'llama3-8b'"):
        shapes.named("llama3-9b")


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_random_network_neither_fades_nor_explodes(shape: str) -> None:
    published = shapes.named(shape)
    small = replace(
        published, layers=12, hidden=64, intermediate=160, q_heads=4, head_dim=16, vocab_size=300,
        kv_heads=2 if published.rope else 4,
    )  # fmt: skip
    prompt = torch.randint(300, (40,)).tolist()
    given = [
        logits(shapes.random_model(small, device="cpu", dtype=torch.float32, seed=seed), prompt)
        for seed in (1, 1, 2)
    ]
    assert torch.equal(given[0], given[1])
    assert not torch.equal(given[0], given[2])
    # the last norm gives features of size 1, the head sums 64 of them with weights of variance 1/64
    assert 0.5 < float(given[0].std()) < 2.0
