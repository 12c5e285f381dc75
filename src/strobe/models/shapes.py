"""Published models by their sizes alone, and networks of these sizes with random weights.

How fast a model writes depends on its sizes and not on its weights, so what needs no words of sense
can be measured without a download.
"""

from __future__ import annotations

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

    Norms are 1; a matrix `[outputs, inputs]` is normal with variance `1 / inputs`.
    """
    weights = allocate(config, device=device, dtype=dtype)
    rng = torch.Generator(device).manual_seed(seed)
    for tensor in tensors(weights):
        if tensor.ndim == 1:
            tensor.fill_(1.0)
        else:
            tensor.normal_(0.0, tensor.shape[1] ** -0.5, generator=rng)
    return build(config, weights)
