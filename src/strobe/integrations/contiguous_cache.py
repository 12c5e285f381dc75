"""flash_attn's contiguous cache seen as pages."""

from __future__ import annotations

import math
from typing import Any

import torch

_LARGEST_PAGE = 256
_MOST_TABLES = 64


def pages(
    k_cache: torch.Tensor, v_cache: torch.Tensor, batch: int, rows: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Caches `[batch_cache, kv_max, ...]` seen as pages, and the page table of `rows` (None: the first ones).

    Rows of a slice of a longer cache stand further apart than kv_max: what lies between has page numbers
    too, which no table holds. Where rows are not whole pages apart, each is one page.
    """
    stored, kv_max = k_cache.shape[:2]
    apart = _tokens_apart(k_cache) if stored > 1 else kv_max
    if not kv_max or apart < kv_max or (stored > 1 and apart != _tokens_apart(v_cache)):
        return k_cache, v_cache, _table(k_cache, batch, rows, 1, 1)
    page_size = math.gcd(_LARGEST_PAGE, kv_max, apart)
    count = ((stored - 1) * apart + kv_max) // page_size
    k_pages, v_pages = (
        cache.as_strided(
            (count, page_size, *cache.shape[2:]), (page_size * cache.stride(1), *cache.stride()[1:])
        )
        for cache in (k_cache, v_cache)
    )
    return k_pages, v_pages, _table(k_cache, batch, rows, apart // page_size, kv_max // page_size)


def _tokens_apart(cache: torch.Tensor) -> int:
    """Tokens from the start of a row to the next row's; 0 where that is no whole number of them."""
    row, token = cache.stride()[:2]
    return row // token if token and row % token == 0 else 0


def _table(
    cache: torch.Tensor, batch: int, rows: torch.Tensor | None, apart: int, columns: int
) -> torch.Tensor:
    """int32 `[batch, columns]`: the pages of rows that stand `apart` pages from one another.

    Those of the first rows are kept, which takes four kernels off each call; not what a trace or the capture
    of a graph makes, which holds no numbers yet.
    """
    kept = rows is None and type(cache) is torch.Tensor and not torch.compiler.is_compiling()
    key = batch, apart, columns, cache.device
    if kept and key in _tables:
        return _tables[key]
    with torch.inference_mode(False):
        if rows is None:
            rows = torch.arange(batch, device=cache.device)
        columns_of = torch.arange(columns, dtype=torch.int32, device=cache.device)
        table = rows.to(torch.int32)[:, None] * apart + columns_of
    if kept and not (cache.is_cuda and torch.cuda.is_current_stream_capturing()):
        if len(_tables) >= _MOST_TABLES:
            _tables.clear()
        _tables[key] = table
    return table


_tables: dict[Any, torch.Tensor] = {}
