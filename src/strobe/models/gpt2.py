"""The GPT-2 network (Radford et al. 2019): LayerNorm, learned positions, full attention, a tanh-GELU MLP."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from strobe.linear import Projection
from strobe.models.batch import Batch
from strobe.models.config import ModelConfig
from strobe.ops import cache
from strobe.ops.activation import gelu_tanh
from strobe.ops.norm import layer_norm


@dataclass(frozen=True, eq=False)
class Norm:
    """LayerNorm's weight and bias, `[hidden]` both."""

    weight: torch.Tensor
    bias: torch.Tensor


@dataclass(frozen=True, eq=False)
class GPT2Layer:
    """One block's weights. `qkv` is `[3 * hidden, hidden]`: all queries, then keys, then values."""

    attention_norm: Norm
    qkv: Projection
    output: Projection
    mlp_norm: Norm
    up: Projection
    down: Projection


@dataclass(frozen=True, eq=False)
class GPT2Weights:
    """embedding `[vocab_size, hidden]`, the head's weight too where they are tied.

    positions `[max_position, hidden]`.
    """

    embedding: torch.Tensor
    positions: torch.Tensor
    layers: tuple[GPT2Layer, ...]
    norm: Norm
    head: Projection

    @classmethod
    def allocate(cls, config: ModelConfig, *, device: torch.device | str, dtype: torch.dtype) -> GPT2Weights:
        """Uninitialised weights of the right shapes."""

        def rows(*shape: int) -> torch.Tensor:
            return torch.empty(shape, device=device, dtype=dtype)

        def norm(size: int) -> Norm:
            return Norm(rows(size), rows(size))

        def projection(outputs: int, inputs: int, *, bias: bool = True) -> Projection:
            return Projection.empty(outputs, inputs, device=device, dtype=dtype, bias=bias)

        c = config
        layers = tuple(
            GPT2Layer(
                attention_norm=norm(c.hidden),
                qkv=projection(c.q_size + 2 * c.kv_size, c.hidden),
                output=projection(c.hidden, c.q_size),
                mlp_norm=norm(c.hidden),
                up=projection(c.intermediate, c.hidden),
                down=projection(c.hidden, c.intermediate),
            )
            for _ in range(c.layers)
        )
        head = projection(c.vocab_size, c.hidden, bias=False)
        embedding = head.weight if c.tie_embeddings else rows(c.vocab_size, c.hidden)
        return cls(embedding, rows(c.max_position, c.hidden), layers, norm(c.hidden), head)


class GPT2:
    """`GPT2(config, weights)(batch)` → logits. Holds nothing between calls; the cache is in the batch."""

    def __init__(self, config: ModelConfig, weights: GPT2Weights) -> None:
        self.config = config
        self.weights = weights
        self.device = weights.embedding.device
        self.dtype = weights.embedding.dtype

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Append this step's keys and values to the cache; logits `[n, vocab_size]`, like the weights."""
        w, kernel = self.weights, batch.linear_kernel
        x = F.embedding(batch.ids, w.embedding) + F.embedding(batch.positions, w.positions)
        for index, layer in enumerate(w.layers):
            qkv = layer.qkv(self._norm(x, layer.attention_norm), kernel=kernel)
            layer.output(self._attention(index, qkv, batch), residual=x, kernel=kernel)
            raised = layer.up(self._norm(x, layer.mlp_norm), kernel=kernel)
            layer.down(gelu_tanh(raised), residual=x, kernel=kernel)
        x = self._norm(batch.wanted(x), w.norm)
        return w.head(x, kernel=kernel)

    def _attention(self, index: int, qkv: torch.Tensor, batch: Batch) -> torch.Tensor:
        """qkv `[tokens, 3 * q_size]` → `[tokens, q_size]`, its keys and values appended."""
        c = self.config
        q, k, v = qkv.view(-1, 3 * c.q_heads, c.head_dim).chunk(3, dim=1)
        k_pages, v_pages = batch.kv_cache.layers[index]
        cache.append(k, v, k_pages, v_pages, batch.slots, cache.Options(settled=batch.layout.settled))
        return batch.attend(index, q)

    def _norm(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        return layer_norm(x, norm.weight, norm.bias, self.config.norm_eps)
