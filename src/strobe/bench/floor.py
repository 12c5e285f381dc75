"""The least time that a machine could take for an engine's work: its bytes, or its operations, at full rate.

docs/math.md, equation 8, over a whole model: weights are read once a step, each row's keys and values
once a token, and no engine does less than two operations a weight and token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from strobe.bench.ceilings import Ceilings
from strobe.models import shapes
from strobe.models.config import ModelConfig


def step_weight_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Weights that every step reads: all but the embedding, of which a token reads one row.

    A tied embedding is read whole, as the head.
    """
    rows = 0 if config.tie_embeddings else config.vocab_size
    rows += config.max_position if config.rope is None else 0
    return shapes.weight_bytes(config, dtype) - rows * config.hidden * dtype.itemsize


def kv_bytes(config: ModelConfig, dtype: torch.dtype, context: int) -> int:
    """Keys and values that one token's attention reads when `context` tokens are visible in full layers."""
    keys = 0
    for layer in range(config.layers):
        left, _ = config.window(layer)
        keys += context if left < 0 else min(context, left + 1)
    return 2 * keys * config.kv_size * dtype.itemsize


def decode_bytes(config: ModelConfig, dtype: torch.dtype, batch: int, prompt: int, output: int) -> float:
    """Mean bytes of a decode step, over the steps that make the 2nd to the last of `output` tokens."""
    contexts = range(prompt + 1, prompt + output)
    keys = sum(kv_bytes(config, dtype, context) for context in contexts) / max(len(contexts), 1)
    return step_weight_bytes(config, dtype) + batch * keys


def load_bytes(
    config: ModelConfig, dtype: torch.dtype, prompts: Sequence[int], outputs: Sequence[int]
) -> float:
    """Fewest bytes for requests of these lengths, all there at the start.

    The weights as often as the longest output has tokens, and the keys and values of every token.
    """
    keys = sum(
        kv_bytes(config, dtype, prompt + output // 2) * (output - 1)
        for prompt, output in zip(prompts, outputs, strict=True)
    )
    return step_weight_bytes(config, dtype) * max(outputs) + keys


def load_seconds(
    config: ModelConfig, dtype: torch.dtype, prompts: Sequence[int], outputs: Sequence[int], roof: Ceilings
) -> float:
    """Least seconds for them: `load_bytes` at the read ceiling, or the operations at the matmul's.

    Two operations for each weight and token, the head's for output tokens alone; attention's are left out.
    """
    weights = step_weight_bytes(config, dtype)
    head = config.vocab_size * config.hidden * dtype.itemsize
    tokens = sum(prompts) + sum(outputs) - len(outputs)
    flops = 2 * (tokens * (weights - head) + sum(outputs) * head) / dtype.itemsize
    read = load_bytes(config, dtype, prompts, outputs) / (roof.read_gbps * 1e9)
    return max(flops / (roof.matmul_tflops * 1e12), read)
