"""What a device's memory is spent on: weights, the KV cache, what a forward pass needs, and the rest."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import torch

from strobe.engine import graphs
from strobe.engine.config import EngineConfig
from strobe.errors import SettingsError
from strobe.models.config import ModelConfig
from strobe.models.network import Model, tensors

GIB = 1 << 30
CPU_CACHE_BYTES = GIB // 2
"""What the cache takes of a host's memory unless told otherwise."""
GPU_CACHE_SHARE = 0.85
"""Share of a GPU's free memory that the cache takes unless told otherwise."""
_LIBRARIES = GIB // 4
"""What libraries and the driver keep for themselves once they run, with CUDA graphs."""


@dataclass(frozen=True)
class Memory:
    """A device's, in bytes. What is not free is taken by the weights, and by others."""

    free: int
    total: int


@dataclass(frozen=True)
class MemoryPlan:
    """`pages` pages of the KV cache, of `page_tokens` tokens each; bytes of everything else.

    `workspace` is what a forward pass may need at most, by its sizes, `graphs` what CUDA graphs keep beside
    it. `max_model_len` tokens fit the cache.
    """

    pages: int
    page_tokens: int
    page_bytes: int
    max_model_len: int
    weights: int
    workspace: int
    graphs: int
    memory: Memory
    device: str

    def __str__(self) -> str:
        cache = self.pages * self.page_bytes
        left = self.memory.free - cache - self.workspace - self.graphs
        captured = f", {_gib(self.graphs)} for CUDA graphs" if self.graphs else ""
        return (
            f"memory on {self.device}: weights {_gib(self.weights)}, KV cache {_gib(cache)} for "
            f"{self.pages * self.page_tokens:,} tokens, up to {_gib(self.workspace)} for a step{captured}, "
            f"{_gib(max(0, left))} left free of {_gib(self.memory.total)}"
        )


def plan_memory(model: Model, config: EngineConfig, memory: Memory | None = None) -> MemoryPlan:
    """Pages for `max_num_seqs` full contexts, as far as memory goes; `memory` is the model's device's.

    Raises:
        SettingsError: `max_model_len` is over the model's context or the cache's room, or the memory asked
            for is not there.
    """
    network = model.config
    memory = memory or memory_of(model.device)
    page_bytes = 2 * network.layers * config.page_size * network.kv_size * model.dtype.itemsize
    context = config.max_model_len or network.max_position
    if context > network.max_position:
        raise SettingsError(f"max_model_len is {context}; the model's context is {network.max_position}")
    on_gpu = model.device.type == "cuda"
    workspace, captured = _workspace(network, config, model.dtype.itemsize, on_gpu=on_gpu)
    sizes = _Sizes(memory, page_bytes, config.page_size, workspace + captured)
    pages = _pages(sizes, config, context, on_gpu=on_gpu)
    room = pages * config.page_size
    if config.max_model_len is not None and room < context:
        raise SettingsError(
            f"max_model_len is {context}; the KV cache's {pages} pages hold {room} tokens",
            hint=f"lower max_model_len to {room}, or give the cache {_gib(sizes.bytes_for(context))}",
        )
    return MemoryPlan(
        pages,
        config.page_size,
        page_bytes,
        min(context, room),
        sum(tensor.nbytes for tensor in tensors(model.weights)),
        workspace,
        captured,
        memory,
        str(model.device),
    )


def memory_of(device: torch.device) -> Memory:
    """What an allocation on the device may still take, and all there is."""
    if device.type == "cuda":
        return Memory(*torch.cuda.mem_get_info(device))
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        return Memory(page * os.sysconf("SC_AVPHYS_PAGES"), page * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, OSError, ValueError):
        return Memory(4 * GIB, 4 * GIB)


def free_memory(device: torch.device) -> int:
    """Bytes that an allocation on the device may still take."""
    return memory_of(device).free


@dataclass(frozen=True)
class _Sizes:
    memory: Memory
    page_bytes: int
    page_tokens: int
    workspace: int
    """With what CUDA graphs keep."""

    @property
    def room(self) -> int:
        """Bytes that a cache may take."""
        return max(0, self.memory.free - self.workspace)

    def bytes_for(self, tokens: int) -> int:
        return -(-tokens // self.page_tokens) * self.page_bytes

    def would_fit(self) -> str:
        """What the room holds, for a hint."""
        pages = self.room // self.page_bytes
        if not pages:
            return "a smaller model, or one in fewer bits, would fit"
        gib = math.floor(100 * pages * self.page_bytes / GIB) / 100
        if not gib:
            return f"{pages} pages would fit, for a context of {pages * self.page_tokens} tokens"
        return f"kv_cache_gib={gib:g} would fit, for a context of {pages * self.page_tokens} tokens"


def _pages(sizes: _Sizes, config: EngineConfig, context: int, *, on_gpu: bool) -> int:
    page_bytes, memory = sizes.page_bytes, sizes.memory
    fraction = config.gpu_memory_fraction
    if fraction is not None and not on_gpu:
        raise SettingsError("gpu_memory_fraction is given, and the model is on no GPU", hint="kv_cache_gib")
    if config.kv_cache_pages is not None:
        pages = config.kv_cache_pages
    elif config.kv_cache_gib is not None:
        pages = int(config.kv_cache_gib * GIB) // page_bytes
        if pages < 1:
            raise SettingsError(
                f"kv_cache_gib is {config.kv_cache_gib:g}; a page of this model takes "
                f"{page_bytes / GIB:.2g} GiB"
            )
    elif fraction is not None:
        taken = memory.total - memory.free + sizes.workspace
        pages = int(fraction * memory.total - taken) // page_bytes
        if pages < 1:
            least = math.ceil(100 * (taken + sizes.bytes_for(context)) / memory.total) / 100
            raise SettingsError(
                f"gpu_memory_fraction is {fraction:g}; weights, what others hold and a step take "
                f"{taken / memory.total:.2f} of {_gib(memory.total)} already",
                hint=f"a context of {context} tokens fits from {least:g} on"
                if least <= 1
                else sizes.would_fit(),
            )
        pages = min(pages, _wanted(config, context))
    else:
        most = min(int(memory.free * GPU_CACHE_SHARE), sizes.room) if on_gpu else CPU_CACHE_BYTES
        pages = min(_wanted(config, context), most // page_bytes)
    if pages < 1 or pages * page_bytes > memory.free:
        raise SettingsError(
            f"the KV cache would take {max(pages, 1) * page_bytes / GIB:.2f} GiB; "
            f"{memory.free / GIB:.2f} GiB are free, of which a step takes {_gib(sizes.workspace)}",
            hint=sizes.would_fit(),
        )
    return pages


def _wanted(config: EngineConfig, context: int) -> int:
    """Pages that all sequences would hold at full length."""
    return config.max_num_seqs * -(-context // config.page_size)


def _workspace(network: ModelConfig, config: EngineConfig, itemsize: int, *, on_gpu: bool) -> tuple[int, int]:
    """Bytes of a step's tensors at its largest: of one layer's, the widest at a time, and of the logits; and
    what CUDA graphs keep beside them.

    A layer holds the stream, its norm, and gate, up and their product, or q, k, v and what attention
    gives. Beside logits there are counts for penalties, and what torch's draw makes of them. CUDA graphs
    share memory of their own, for the largest of them.
    """
    widest = max(3 * network.intermediate, 2 * (network.q_size + network.kv_size))
    a_token = (3 * network.hidden + widest) * itemsize
    rows, drawn = config.max_num_seqs, 4 if on_gpu and config.sampling_kernel != "torch" else 4 * 4
    step = config.step_tokens * a_token + rows * network.vocab_size * (itemsize + drawn)
    captured = min(rows, graphs.LARGEST) * (a_token + network.vocab_size * itemsize)
    return step + (_LIBRARIES if on_gpu else 0), captured if config.graphs else 0


def _gib(size: int) -> str:
    return f"{size / GIB:.3g} GiB"
