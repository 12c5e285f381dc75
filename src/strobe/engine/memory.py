"""How many pages the KV cache gets."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from strobe.engine.config import EngineConfig
from strobe.errors import SettingsError
from strobe.models.network import Model

GIB = 1 << 30
CPU_CACHE_BYTES = GIB // 2
"""What the cache takes of a host's memory unless told otherwise."""
GPU_CACHE_SHARE = 0.85
"""Share of a GPU's free memory that the cache takes unless told otherwise; the rest is activations."""


@dataclass(frozen=True)
class PagePlan:
    """`max_model_len` tokens fit `pages` pages."""

    pages: int
    max_model_len: int
    page_bytes: int


def plan_pages(model: Model, config: EngineConfig) -> PagePlan:
    """Pages for `max_num_seqs` full contexts, as far as memory goes.

    Raises:
        SettingsError: `max_model_len` is over the model's context or the cache's room, or the cache asked
            for is over the memory that is free.
    """
    network = model.config
    page_bytes = 2 * network.layers * config.page_size * network.kv_size * model.dtype.itemsize
    context = config.max_model_len or network.max_position
    if context > network.max_position:
        raise SettingsError(f"max_model_len is {context}; the model's context is {network.max_position}")
    free = free_memory(model.device)
    wanted = config.max_num_seqs * -(-context // config.page_size)
    if config.kv_cache_pages is not None:
        pages = config.kv_cache_pages
    elif config.kv_cache_gib is not None:
        pages = int(config.kv_cache_gib * GIB) // page_bytes
    else:
        on_gpu = model.device.type == "cuda"
        pages = min(wanted, (int(free * GPU_CACHE_SHARE) if on_gpu else CPU_CACHE_BYTES) // page_bytes)
    if pages < 1 and config.kv_cache_gib is not None:
        raise SettingsError(
            f"kv_cache_gib is {config.kv_cache_gib:g}; a page of this model takes {page_bytes / GIB:.2g} GiB"
        )
    if pages < 1 or pages * page_bytes > free:
        wanted_gib = max(pages, 1) * page_bytes / GIB
        raise SettingsError(
            f"the KV cache would take {wanted_gib:.2f} GiB; {free / GIB:.2f} GiB are free",
            hint="set kv_cache_gib",
        )
    room = pages * config.page_size
    if config.max_model_len is not None and room < context:
        raise SettingsError(
            f"max_model_len is {context}; the KV cache's {pages} pages hold {room} tokens",
            hint="lower max_model_len or raise kv_cache_gib",
        )
    return PagePlan(pages, min(context, room), page_bytes)


def free_memory(device: torch.device) -> int:
    """Bytes that an allocation on the device may still take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 4 * GIB
