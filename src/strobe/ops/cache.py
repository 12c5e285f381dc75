"""Writing keys and values into their pages."""

from __future__ import annotations

import torch


def append(
    k: torch.Tensor, v: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, slots: torch.Tensor
) -> None:
    """Store each token's key and value of one layer, in place.

    k and v `[tokens, kv_heads, head_dim]`; k_pages and v_pages `[pages, page_size, kv_heads, head_dim]`,
    contiguous; slots int64 `[tokens]`, `page * page_size + offset`, each within the cache.
    """
    k_pages.flatten(0, 1).index_copy_(0, slots, k.to(k_pages.dtype))
    v_pages.flatten(0, 1).index_copy_(0, slots, v.to(v_pages.dtype))
