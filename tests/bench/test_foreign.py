"""Other engines get the network that strobe runs: its config reads back, its weights are the same memory."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from strobe.bench import foreign
from strobe.bench.verify import logits
from strobe.checkpoints.huggingface_config import model_config
from strobe.errors import StrobeError
from strobe.models import shapes
from strobe.models.config import ModelConfig, Rope


def small(shape: str) -> ModelConfig:
    published = shapes.named(shape)
    sizes = {"layers": 2, "hidden": 48, "q_heads": 4, "head_dim": 12, "vocab_size": 99, "max_position": 64}
    family = (
        {"intermediate": 192, "kv_heads": 4}
        if published.rope is None
        else {"intermediate": 80, "kv_heads": 2}
    )
    window = {"sliding_window": 5} if published.sliding_window else {}
    return replace(published, **sizes, **family, **window)


YARN = Rope(scaling="yarn", factor=2.0, original_max_position=16, attention_factor=1.2)


@pytest.mark.parametrize("rope", [None, YARN])
@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_a_config_reads_back_as_it_was(shape: str, rope: Rope | None, tmp_path: Path) -> None:
    config = shapes.named(shape)
    if config.rope is not None:
        config = replace(config, rope=rope or config.rope)
    foreign.write_config(config, tmp_path / "deep")
    values = json.loads((tmp_path / "deep" / "config.json").read_text())
    assert model_config(tmp_path, values, {}) == config
    assert values["dtype"] == "bfloat16"


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_transformers_computes_with_our_own_memory(shape: str) -> None:
    model = shapes.random_model(small(shape), device="cpu", dtype=torch.float32, seed=torch.seed() % 2**31)
    theirs = foreign.transformers_network(model)
    prompt = torch.randint(99, (23,)).tolist()
    with torch.inference_mode():
        before = theirs(torch.tensor([prompt])).logits[0]
        torch.testing.assert_close(before, logits(model, prompt), atol=2e-4, rtol=1e-4)
        model.weights.embedding.mul_(-1)
        after = theirs(torch.tensor([prompt])).logits[0]
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, logits(model, prompt), atol=2e-4, rtol=1e-4)


def test_a_network_of_no_family_is_refused() -> None:
    with pytest.raises(StrobeError, match="no published family"):
        foreign.huggingface_config(replace(small("llama3-8b"), qkv_bias=True, qk_norm=True))
