"""flash_attn's caches as strobe has them: contiguous ones seen as pages, and layouts that calls share."""

from __future__ import annotations

import math
from threading import get_ident
from typing import Any

import torch

from strobe.attention import Paged

_LARGEST_PAGE = 256
_MOST_TABLES = 64
_MOST_LAYOUTS = 8
"""Each keeps its table, which may be large."""


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
    kept = rows is None and _keeps(cache)
    key = batch, apart, columns, cache.device
    if kept and key in _tables:
        return _tables[key]
    with torch.inference_mode(False):
        if rows is None:
            rows = torch.arange(batch, device=cache.device)
        columns_of = torch.arange(columns, dtype=torch.int32, device=cache.device)
        table = rows.to(torch.int32)[:, None] * apart + columns_of
    if kept and not _captures(cache):
        if len(_tables) >= _MOST_TABLES:
            _tables.clear()
        _tables[key] = table
    return table


def layout(table: torch.Tensor, before: torch.Tensor, new_len: int, q_len: int, room: int) -> Paged:
    """Of rows with `before` + `new_len` keys, int32 `[batch]`, in the pages of `table`.

    Calls over one table share one, and with it the plans that hang on it (attention/plan.py): their lengths
    are written over those of the call before. So it is a thread's and a stream's own, and no graph's.
    """
    if not _keeps(table, before) or _captures(table):
        return Paged(table, before + new_len, max_q_len=q_len, max_kv_len=room)
    stream = torch.cuda.current_stream(table.device).cuda_stream if table.is_cuda else 0
    key = id(table), len(before), q_len, room, stream, get_ident()
    found = _layouts.pop(key, None)
    if found is None:
        while len(_layouts) >= _MOST_LAYOUTS:
            _layouts.pop(next(iter(_layouts)), None)
        with torch.inference_mode(False):  # where it is counted what is written to
            found = Paged(table, torch.empty_like(before), max_q_len=q_len, max_kv_len=room)
    _layouts[key] = found  # the latest stands last
    torch.add(before, new_len, out=found.seq_lens)
    return found


def _keeps(*tensors: torch.Tensor) -> bool:
    """Whether these are tensors with memory, none of a trace's or torch.func's."""
    if torch.compiler.is_compiling():
        return False
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return all(type(x) is torch.Tensor and not wrapped(x) for x in tensors)


def _captures(tensor: torch.Tensor) -> bool:
    """Whether what is made now belongs to a CUDA graph."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


_tables: dict[Any, torch.Tensor] = {}
_layouts: dict[Any, Paged] = {}
