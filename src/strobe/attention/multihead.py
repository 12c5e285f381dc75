"""Multi-head attention as a module: projections around `attention()`."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from strobe.attention.api import attention
from strobe.errors import ProblemError


class MultiHeadAttention(nn.Module):
    """`out_proj(concat over heads of attention(q_proj(query), k_proj(key), v_proj(value)))`.

    Its parameters have the names and shapes of torch.nn.MultiheadAttention, whose state_dict it loads
    and whose results it equals (batch first, no dropout). `kdim` and `vdim` are the features of keys and
    values where they are not embed_dim. `kernel` names a rung of the ladder.

    Source: Vaswani et al. 2017 (arXiv 1706.03762), section 3.2.2.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        bias: bool = True,
        kdim: int | None = None,
        vdim: int | None = None,
        kernel: str = "auto",
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads:
            raise ProblemError(f"embed_dim {embed_dim} is not a multiple of num_heads {num_heads}")
        self.num_heads = num_heads
        self.kernel = kernel
        widths = (embed_dim, kdim or embed_dim, vdim or embed_dim)
        if widths == (embed_dim,) * 3:
            self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim))
        else:
            self.register_parameter("in_proj_weight", None)
            for name, width in zip("qkv", widths, strict=True):
                self.register_parameter(f"{name}_proj_weight", nn.Parameter(torch.empty(embed_dim, width)))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * embed_dim)) if bias else None
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        for name, parameter in self.named_parameters(recurse=False):
            if name.endswith("weight"):
                nn.init.xavier_uniform_(parameter)
        if bias:
            nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None = None,
        value: torch.Tensor | None = None,
        *,
        causal: bool = False,
        attn_mask: torch.Tensor | None = None,
        key_padding_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """query `[batch, q_len, embed_dim]` → the same shape.

        key `[batch, kv_len, kdim]`, the query itself where it is left out; value `[batch, kv_len, vdim]`,
        the key. Masks are as torch.nn.MultiheadAttention has them, True hides and numbers are added to
        the scores: attn_mask `[q_len, kv_len]` or `[batch * num_heads, q_len, kv_len]`, key_padding_mask
        `[batch, kv_len]`. A query that sees no key gives out_proj's bias, where torch gives NaN.

        Raises ProblemError and KernelRefusedError as `attention()`.
        """
        key = query if key is None else key
        value = key if value is None else value
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)) for x in self._projected(query, key, value))
        bias = None
        if attn_mask is not None:
            bias = _additive(attn_mask, q.dtype)
            bias = bias.unflatten(0, (-1, self.num_heads)) if bias.dim() == 3 else bias
        if key_padding_mask is not None:
            hidden = _additive(key_padding_mask, q.dtype)[:, None, None]
            bias = hidden if bias is None else bias + hidden
        out = attention(q, k, v, causal=causal, bias=bias, kernel=self.kernel)
        return self.out_proj(cast(torch.Tensor, out).flatten(-2))

    def _projected(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        if self.in_proj_weight is not None and query is key is value:
            return F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return tuple(map(F.linear, (query, key, value), weights, biases))


def _additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask that hides where it is True, as numbers to add."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask, float("-inf"))
