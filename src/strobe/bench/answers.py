"""Were greedy tokens the right ones? Logits nearer to one another than their dtype tells apart may tie."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from strobe.bench.verify import logits
from strobe.models.network import Model

TIE = 1e-3
"""Logits closer than this, relative to the largest, may come out in either order."""
REFERENCE = {"attention_kernel": "torch_naive", "linear_kernel": "torch_linear"}
"""PyTorch's own calls, which every other kernel's tokens are compared with."""


def tolerance(dtype: torch.dtype) -> float:
    """The share of the largest logit that two may differ by and still tie."""
    return max(TIE, 4 * torch.finfo(dtype).eps)


def first_wrong(model: Model, prompt: Sequence[int], tokens: Sequence[int]) -> int | None:
    """The first of greedy `tokens` that the reference would not take, even in a tie; None where all hold.

    One forward pass of PyTorch's own calls over the prompt and the tokens gives every step's logits.
    """
    if not tokens:
        return None
    scores = logits(model, [*prompt, *tokens[:-1]], **REFERENCE)[len(prompt) - 1 :]
    taken = scores.gather(1, torch.tensor(tokens, device=scores.device)[:, None]).squeeze(1)
    short = scores.amax(1) - taken > tolerance(model.dtype) * scores.abs().amax(1)
    return int(short.int().argmax()) if bool(short.any()) else None
