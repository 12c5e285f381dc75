"""The networks by name, and what they have in common."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, Protocol

import torch

from strobe.attention.problem import AttentionProblem, Paged
from strobe.device import gpu
from strobe.linear import Projection
from strobe.linear.problem import Append
from strobe.models.batch import Batch
from strobe.models.config import ModelConfig
from strobe.models.gpt2 import GPT2, GPT2Weights
from strobe.models.llama import Llama, LlamaWeights


class Model(Protocol):
    """A network with its weights, all on one device and in one dtype."""

    config: ModelConfig
    weights: Any
    device: torch.device
    dtype: torch.dtype

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Append this step's keys and values to the cache; logits `[n, vocab_size]`, like the weights."""


Weights = LlamaWeights | GPT2Weights


def allocate(config: ModelConfig, *, device: torch.device | str, dtype: torch.dtype) -> Weights:
    """Uninitialised weights for a config's architecture; on device "meta", shapes alone."""
    if config.architecture == "llama":
        return LlamaWeights.allocate(config, device=device, dtype=dtype)
    return GPT2Weights.allocate(config, device=device, dtype=dtype)


def build(config: ModelConfig, weights: Weights) -> Model:
    """The network that runs these weights."""
    return Llama(config, weights) if isinstance(weights, LlamaWeights) else GPT2(config, weights)


def products(model: Model) -> list[tuple[Projection, bool, Append | None]]:
    """A layer's projections and the head: whether each adds to the residual stream, and what it appends to a
    cache of the model's dtype."""
    c, layer = model.config, model.weights.layers[0]
    heads = None
    if isinstance(model, Llama):
        dtype = str(model.dtype).removeprefix("torch.")
        heads = Append(c.q_heads, c.kv_heads, c.head_dim, dtype, head_norms=c.qk_norm)
    found = [
        (each, name in ("output", "down"), heads if name == "qkv" else None)
        for name, each in projections(layer)
    ]
    return [*found, (model.weights.head, False, None)]


def projections(weights: Any) -> Iterator[tuple[str, Projection]]:
    """Those that a layer, or a network beside its layers, holds, by name."""
    for field in fields(weights):
        each = getattr(weights, field.name)
        if isinstance(each, Projection):
            yield field.name, each


def decode_attention(model: Model, rows: int, kv_len: int, page_size: int) -> AttentionProblem:
    """A layer's attention in a step that decodes so many rows of up to `kv_len` keys."""
    c, device, arch = model.config, model.device, 0
    if device.type == "cuda":
        arch = gpu(torch.cuda.current_device() if device.index is None else device.index).arch
    return AttentionProblem(
        batch=rows,
        q_len=1,
        kv_len=kv_len,
        q_heads=c.q_heads,
        kv_heads=c.kv_heads,
        head_dim=c.head_dim,
        dtype=str(model.dtype).removeprefix("torch."),
        causal=True,
        window=c.window(0),
        scale=c.softmax_scale,
        layout=Paged(None, None, settled=True),
        page_size=page_size,
        device=device.type,
        arch=arch,
    )


def tensors(weights: Any) -> Iterator[torch.Tensor]:
    """Every weight once, tied ones too."""
    seen: set[int] = set()
    stack = [weights]
    while stack:
        item = stack.pop()
        if isinstance(item, torch.Tensor) and id(item) not in seen:
            seen.add(id(item))
            yield item
        elif isinstance(item, tuple):
            stack.extend(item)
        elif is_dataclass(item):
            stack.extend(getattr(item, field.name) for field in fields(item))
