"""Published models by their sizes alone, and networks of these sizes with random weights.

How fast a model writes depends on its sizes and not on its weights, so what needs no words of sense
can be measured without a download.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch

from strobe.errors import UnknownNameError
from strobe.models.config import ModelConfig, Rope
from strobe.models.network import Model, allocate, build, tensors

SHAPES = {
    # Touvron et al. 2023 (arXiv 2307.09288)
    "llama2-7b": ModelConfig(
        architecture="llama",
        layers=32,
        hidden=4096,
        intermediate=11008,
        q_heads=32,
        kv_heads=32,
        head_dim=128,
        vocab_size=32000,
        max_position=4096,
        norm_eps=1e-5,
    ),
    # Grattafiori et al. 2024 (arXiv 2407.21783)
    "llama3-8b": ModelConfig(
        architecture="llama",
        layers=32,
        hidden=4096,
        intermediate=14336,
        q_heads=32,
        kv_heads=8,
        head_dim=128,
        vocab_size=128256,
        max_position=8192,
        norm_eps=1e-5,
        rope=Rope(theta=500000.0),
    ),
    # the model card of Llama 3.2
    "llama3.2-1b": ModelConfig(
        architecture="llama",
        layers=16,
        hidden=2048,
        intermediate=8192,
        q_heads=32,
        kv_heads=8,
        head_dim=64,
        vocab_size=128256,
        max_position=131072,
        norm_eps=1e-5,
        rope=Rope(theta=500000.0, scaling="llama3", factor=32.0),
        tie_embeddings=True,
    ),
    # the model card of Llama 3.2
    "llama3.2-3b": ModelConfig(
        architecture="llama",
        layers=28,
        hidden=3072,
        intermediate=8192,
        q_heads=24,
        kv_heads=8,
        head_dim=128,
        vocab_size=128256,
        max_position=131072,
        norm_eps=1e-5,
        rope=Rope(theta=500000.0, scaling="llama3", factor=32.0),
        tie_embeddings=True,
    ),
    # Jiang et al. 2023 (arXiv 2310.06825), with its sliding window
    "mistral-7b": ModelConfig(
        architecture="llama",
        layers=32,
        hidden=4096,
        intermediate=14336,
        q_heads=32,
        kv_heads=8,
        head_dim=128,
        vocab_size=32000,
        max_position=32768,
        norm_eps=1e-5,
        sliding_window=4096,
    ),
    # Qwen team 2024 (arXiv 2412.15115): a bias on q, k and v
    "qwen2.5-7b": ModelConfig(
        architecture="llama",
        layers=28,
        hidden=3584,
        intermediate=18944,
        q_heads=28,
        kv_heads=4,
        head_dim=128,
        vocab_size=152064,
        max_position=131072,
        norm_eps=1e-6,
        rope=Rope(theta=1000000.0),
        qkv_bias=True,
    ),
    # Qwen team 2025 (arXiv 2505.09388): a norm on each query and key head
    "qwen3-8b": ModelConfig(
        architecture="llama",
        layers=36,
        hidden=4096,
        intermediate=12288,
        q_heads=32,
        kv_heads=8,
        head_dim=128,
        vocab_size=151936,
        max_position=40960,
        norm_eps=1e-6,
        rope=Rope(theta=1000000.0),
        qk_norm=True,
    ),
    # Radford et al. 2019, the smallest of the four
    "gpt2": ModelConfig(
        architecture="gpt2",
        layers=12,
        hidden=768,
        intermediate=3072,
        q_heads=12,
        kv_heads=12,
        head_dim=64,
        vocab_size=50257,
        max_position=1024,
        norm_eps=1e-5,
        rope=None,
        tie_embeddings=True,
    ),
}


def named(shape: str) -> ModelConfig:
    """The published sizes of this name. Raises UnknownNameError."""
    if shape not in SHAPES:
        raise UnknownNameError.among("shape", shape, SHAPES)
    return SHAPES[shape]


def weight_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """What a network of these sizes takes."""
    return sum(t.nbytes for t in tensors(allocate(config, device="meta", dtype=dtype)))


def random_model(
    config: ModelConfig, *, device: torch.device | str, dtype: torch.dtype, seed: int = 0
) -> Model:
    """A network of these sizes, its weights drawn on the device so that activations keep their scale.

    Norms are 1, biases small; a matrix `[outputs, inputs]` is normal with variance `1 / inputs`.
    """
    weights = allocate(config, device=device, dtype=dtype)
    rng = torch.Generator(device).manual_seed(seed)
    for name, tensor in _named(weights):
        if tensor.ndim == 2:
            tensor.normal_(0.0, tensor.shape[1] ** -0.5, generator=rng)
        elif "bias" in name:
            tensor.normal_(0.0, 0.1, generator=rng)
        else:
            tensor.fill_(1.0)
    return build(config, weights)


def _named(item: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight with its field's name; a tied one twice."""
    if isinstance(item, torch.Tensor):
        yield name, item
    elif isinstance(item, tuple):
        for part in item:
            yield from _named(part, name)
    elif is_dataclass(item):
        for each in fields(item):
            yield from _named(getattr(item, each.name), each.name)
