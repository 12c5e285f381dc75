"""Moving whole pages of the cache: torch's copies on a CPU, a CUDA kernel of our own on a GPU."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from strobe.cuda import jit

_SOURCE = Path(__file__).with_suffix(".cu")
_THREADS = 256
_MOST = 65535
"""Pages of one launch: the grid's second dimension."""


def copy_pages(k: torch.Tensor, v: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy pages `source[i]` onto `target[i]` in all layers, in place.

    k and v `[layers, pages, page_size, kv_heads, head_dim]`, contiguous; source and target int64 `[n]`.
    No target is a source or stands twice.
    """
    for cache in (k, v):
        if _runs(cache):
            for some, onto in zip(source.split(_MOST), target.split(_MOST), strict=True):
                _launch_copy(cache, cache, some, onto)
        else:
            cache[:, target] = cache[:, source]


def gather_pages(pages: torch.Tensor, page_table: torch.Tensor) -> torch.Tensor:
    """Pages `[pages, page_size, kv_heads, head_dim]` in the order of int64 `page_table` `[n]`, as tokens.

    Returns `[n * page_size, kv_heads, head_dim]`, contiguous.
    """
    if not _runs(pages.unsqueeze(0)):
        return pages[page_table].flatten(0, 1)
    gathered = pages.new_empty((page_table.shape[0], *pages.shape[1:]))
    for some, into in zip(page_table.split(_MOST), gathered.split(_MOST), strict=True):
        _launch_copy(pages.unsqueeze(0), into.unsqueeze(0), some, None)
    return gathered.flatten(0, 1)


def sources(arch: str) -> list[jit.Source]:
    return [jit.Source(_SOURCE)]


def _runs(cache: torch.Tensor) -> bool:
    """Whether the kernel moves pages of `[layers, pages, ...]`: whole 16-byte words."""
    size = cache[0, :1].numel() * cache.element_size()
    return (
        cache.device.type == "cuda"
        and cache.is_contiguous()
        and size % 16 == 0
        and cache.data_ptr() % 16 == 0
    )


class _Copy(ctypes.Structure):
    """`Copy` of pages.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("source_pages", "target_pages", "source", "target")),
        *((name, ctypes.c_int64) for name in ("page", "source_layer", "target_layer")),
    ]


def _launch_copy(
    source_pages: torch.Tensor, target_pages: torch.Tensor, source: torch.Tensor, target: torch.Tensor | None
) -> None:
    """`[layers, pages, ...]` both, contiguous."""
    words = source_pages[0, 0].numel() * source_pages.element_size() // 16
    layers, n = source_pages.shape[0], source.shape[0]
    params = _Copy(
        source_pages.data_ptr(),
        target_pages.data_ptr(),
        source.data_ptr(),
        None if target is None else target.data_ptr(),
        words,
        source_pages.shape[1] * words,
        target_pages.shape[1] * words,
    )
    if n:
        kernel = jit.kernel(_SOURCE, "copy_pages", device=source_pages.get_device())
        kernel((-(-words // _THREADS), n, layers), _THREADS, params)
