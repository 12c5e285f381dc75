"""Multi-head attention as a module: projections around `attention()`."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from strobe.attention.api import attention
from strobe.errors import ProblemError


class MultiHeadAttention(nn.Module):
    """`out_proj(concat over heads of attention(q_proj(x), k_proj(x), v_proj(x)))`.

    Takes and returns `[batch, tokens, embed_dim]`. Its parameters have the names and shapes of
    torch.nn.MultiheadAttention, whose state_dict it loads and whose results it equals (batch first,
    no dropout). `kernel` names a rung of the ladder.

    Source: Vaswani et al. 2017 (arXiv 1706.03762), section 3.2.2.
    """

    def __init__(self, embed_dim: int, num_heads: int, *, bias: bool = True, kernel: str = "auto") -> None:
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads:
            raise ProblemError(f"embed_dim {embed_dim} is not a multiple of num_heads {num_heads}")
        self.num_heads = num_heads
        self.kernel = kernel
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * embed_dim)) if bias else None
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, x: torch.Tensor, *, causal: bool = False) -> torch.Tensor:
        """x `[batch, tokens, embed_dim]` → the same shape."""
        projected = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = projected.unflatten(-1, (3, self.num_heads, -1)).unbind(dim=2)
        out = attention(q, k, v, causal=causal, kernel=self.kernel)
        return self.out_proj(cast(torch.Tensor, out).flatten(-2))
