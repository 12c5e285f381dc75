"""The Llama network: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Llama 1 to 3.2 (Touvron et al. 2023, arXiv 2302.13971; Grattafiori et al. 2024, arXiv 2407.21783),
Mistral (a sliding window), Qwen2 (a bias on q, k and v) and Qwen3 (a norm on each query and key head).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from strobe import linear
from strobe.attention.api import attention
from strobe.models.batch import Batch
from strobe.models.config import ModelConfig
from strobe.ops import cache, rope
from strobe.ops.activation import swiglu
from strobe.ops.norm import rms_norm


@dataclass(frozen=True, eq=False)
class LlamaLayer:
    """One block's weights. Projections are `[outputs, inputs]`; those that read the same input are one."""

    attention_norm: torch.Tensor
    qkv: torch.Tensor
    """`[(q_heads + 2 * kv_heads) * head_dim, hidden]`: all queries, then keys, then values."""
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    output: torch.Tensor
    output_bias: torch.Tensor | None
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    """`[2 * intermediate, hidden]`: the gate, then up."""
    down: torch.Tensor


@dataclass(frozen=True, eq=False)
class LlamaWeights:
    """embedding and head `[vocab_size, hidden]`, one tensor where they are tied."""

    embedding: torch.Tensor
    layers: tuple[LlamaLayer, ...]
    norm: torch.Tensor
    head: torch.Tensor

    @classmethod
    def allocate(cls, config: ModelConfig, *, device: torch.device | str, dtype: torch.dtype) -> LlamaWeights:
        """Uninitialised weights of the right shapes."""

        def rows(*shape: int) -> torch.Tensor:
            return torch.empty(shape, device=device, dtype=dtype)

        def weight(outputs: int, inputs: int) -> torch.Tensor:
            return linear.empty_weight(outputs, inputs, device=device, dtype=dtype)

        c, qkv_size = config, config.q_size + 2 * config.kv_size
        layers = tuple(
            LlamaLayer(
                attention_norm=rows(c.hidden),
                qkv=weight(qkv_size, c.hidden),
                qkv_bias=rows(qkv_size) if c.qkv_bias else None,
                q_norm=rows(c.head_dim) if c.qk_norm else None,
                k_norm=rows(c.head_dim) if c.qk_norm else None,
                output=weight(c.hidden, c.q_size),
                output_bias=rows(c.hidden) if c.output_bias else None,
                mlp_norm=rows(c.hidden),
                gate_up=weight(2 * c.intermediate, c.hidden),
                down=weight(c.hidden, c.intermediate),
            )
            for _ in range(c.layers)
        )
        head = weight(c.vocab_size, c.hidden)
        embedding = head if c.tie_embeddings else rows(c.vocab_size, c.hidden)
        return cls(embedding, layers, rows(c.hidden), head)


class Llama:
    """`Llama(config, weights)(batch)` → logits. Holds nothing between calls; the cache is in the batch."""

    def __init__(self, config: ModelConfig, weights: LlamaWeights) -> None:
        self.config = config
        self.weights = weights
        self.device = weights.embedding.device
        self.dtype = weights.embedding.dtype
        self._signed_frequencies = rope.signed(config.frequencies, self.device)

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Append this step's keys and values to the batch's cache; float32 logits `[n, vocab_size]`."""
        x = F.embedding(batch.token_ids, self.weights.embedding)
        turn = rope.angles(batch.positions, self._signed_frequencies, x.dtype)
        for index, layer in enumerate(self.weights.layers):
            x += self._attention(index, layer, x, turn, batch)
            x += self._mlp(layer, x, batch)
        x = rms_norm(x.index_select(0, batch.logits_at), self.weights.norm, self.config.norm_eps)
        return linear.apply(x, self.weights.head, kernel=batch.linear_kernel).float()

    def _attention(
        self,
        index: int,
        layer: LlamaLayer,
        x: torch.Tensor,
        turn: tuple[torch.Tensor, torch.Tensor],
        batch: Batch,
    ) -> torch.Tensor:
        """x `[tokens, hidden]` → what attention adds to it."""
        c, kernel = self.config, batch.linear_kernel
        normed = rms_norm(x, layer.attention_norm, c.norm_eps)
        qkv = linear.apply(normed, layer.qkv, layer.qkv_bias, kernel=kernel)
        heads = qkv.view(-1, c.q_heads + 2 * c.kv_heads, c.head_dim)
        qk, v = heads.split_with_sizes((c.q_heads + c.kv_heads, c.kv_heads), 1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = qk.split_with_sizes((c.q_heads, c.kv_heads), 1)
            qk = torch.cat((rms_norm(q, layer.q_norm, c.norm_eps), rms_norm(k, layer.k_norm, c.norm_eps)), 1)
        k_pages, v_pages = batch.kv_cache.k[index], batch.kv_cache.v[index]
        q = cache.append_rotated(qk, v, turn, k_pages, v_pages, batch.slots)
        out: Any = attention(
            batch.rows(q),
            k_pages,
            v_pages,
            causal=True,
            window=c.window(index),
            layout=batch.layout,
            kernel=batch.attention_kernel,
        )
        return linear.apply(out.view(-1, c.q_size), layer.output, layer.output_bias, kernel=kernel)

    def _mlp(self, layer: LlamaLayer, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        """x `[tokens, hidden]` → what the MLP adds to it."""
        normed = rms_norm(x, layer.mlp_norm, self.config.norm_eps)
        gate_up = linear.apply(normed, layer.gate_up, kernel=batch.linear_kernel)
        return linear.apply(swiglu(gate_up), layer.down, kernel=batch.linear_kernel)
