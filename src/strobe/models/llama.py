"""The Llama network: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Llama 1 to 3.2 (Touvron et al. 2023, arXiv 2302.13971; Grattafiori et al. 2024, arXiv 2407.21783),
Mistral (a sliding window), Qwen2 (a bias on q, k and v) and Qwen3 (a norm on each query and key head).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from strobe.linear import Projection
from strobe.models.batch import Batch
from strobe.models.config import ModelConfig
from strobe.ops import cache, rope
from strobe.ops.embedding import embed


@dataclass(frozen=True, eq=False)
class LlamaLayer:
    """One block's weights. Projections that read the same input are one."""

    qkv: Projection
    """`[(q_heads + 2 * kv_heads) * head_dim, hidden]`: all queries, then keys, then values."""
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    output: Projection
    gate_up: Projection
    """`[2 * intermediate, hidden]`: the gate, then up."""
    down: Projection


@dataclass(frozen=True, eq=False)
class LlamaWeights:
    """embedding `[vocab_size, hidden]`, the head's weight too where they are tied."""

    embedding: torch.Tensor
    layers: tuple[LlamaLayer, ...]
    head: Projection

    @classmethod
    def allocate(cls, config: ModelConfig, *, device: torch.device | str, dtype: torch.dtype) -> LlamaWeights:
        """Uninitialised weights of the right shapes."""

        def rows(*shape: int) -> torch.Tensor:
            return torch.empty(shape, device=device, dtype=dtype)

        def projection(outputs: int, inputs: int, **around: Any) -> Projection:
            return Projection.empty(outputs, inputs, device=device, dtype=dtype, **around)

        c = config
        layers = tuple(
            LlamaLayer(
                qkv=projection(c.q_size + 2 * c.kv_size, c.hidden, norm_eps=c.norm_eps, bias=c.qkv_bias),
                q_norm=rows(c.head_dim) if c.qk_norm else None,
                k_norm=rows(c.head_dim) if c.qk_norm else None,
                output=projection(c.hidden, c.q_size, bias=c.output_bias),
                gate_up=projection(2 * c.intermediate, c.hidden, norm_eps=c.norm_eps, swiglu=True),
                down=projection(c.hidden, c.intermediate),
            )
            for _ in range(c.layers)
        )
        head = projection(c.vocab_size, c.hidden, norm_eps=c.norm_eps)
        embedding = head.weight if c.tie_embeddings else rows(c.vocab_size, c.hidden)
        return cls(embedding, layers, head)


class Llama:
    """`Llama(config, weights)(batch)` → logits. Holds nothing between calls; the cache is in the batch."""

    def __init__(self, config: ModelConfig, weights: LlamaWeights) -> None:
        self.config = config
        self.weights = weights
        self.device = weights.embedding.device
        self.dtype = weights.embedding.dtype
        self._signed_frequencies = rope.signed(config.frequencies, self.device)
        self._scale = config.softmax_scale

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Append this step's keys and values to the cache; logits `[n, vocab_size]`, like the weights."""
        kernel = batch.linear_kernel
        x, turn = embed(
            batch.token_ids, self.weights.embedding, batch.positions, self._signed_frequencies, batch.picks
        )
        for index, layer in enumerate(self.weights.layers):
            q = layer.qkv.append(x, self._destination(index, layer, turn, batch), kernel)
            attended = batch.attend(index, q, self.config.window(index), self._scale)
            layer.output(attended, residual=x, kernel=kernel)
            raised = layer.gate_up(x, kernel=kernel)
            layer.down(raised, residual=x, kernel=kernel)
        return self.weights.head(batch.wanted(x), kernel=kernel)

    def _destination(
        self, index: int, layer: LlamaLayer, turn: cache.Turn, batch: Batch
    ) -> cache.Destination:
        """Of a layer's new keys and values."""
        norms = None
        if layer.q_norm is not None and layer.k_norm is not None:
            norms = cache.HeadNorms(layer.q_norm, layer.k_norm, self.config.norm_eps)
        options = cache.Options(norms, settled=batch.layout.settled)
        return cache.Destination(turn, *batch.kv_cache.layers[index], batch.slots, options)
