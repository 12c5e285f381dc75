"""All that one forward pass sees."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from strobe.attention import api
from strobe.attention.problem import UNLIMITED, Options, Paged
from strobe.models.config import ModelConfig


@dataclass(frozen=True, eq=False)
class KvTensors:
    """The paged key-value cache of all layers: k and v `[layers, pages, page_size, kv_heads, head_dim]`."""

    k: torch.Tensor
    v: torch.Tensor

    @classmethod
    def allocate(
        cls,
        config: ModelConfig,
        pages: int,
        page_size: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> KvTensors:
        """Room for `pages * page_size` tokens, zeroed: a page that was never written holds no NaN."""
        shape = (config.layers, pages, page_size, config.kv_heads, config.head_dim)
        return cls(_zeros(shape, dtype, device), _zeros(shape, dtype, device))

    @cached_property
    def layers(self) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
        """Each layer's k and v, `[pages, page_size, kv_heads, head_dim]`."""
        return tuple(zip(self.k, self.v, strict=True))


_SEGMENT_STEP = 2 << 20
"""Bytes in which torch's allocator asks a GPU for memory."""


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    size = math.prod(shape) * dtype.itemsize
    if torch.device(device).type != "cpu":
        # whole steps: what is left of one goes to small tensors, of which one that lives on keeps all of it
        taken = -(-size // _SEGMENT_STEP) * _SEGMENT_STEP
        return torch.zeros(taken, dtype=torch.uint8, device=device)[:size].view(dtype).view(shape)
    # NumPy asks the system for zeroed memory, which takes none until it is written
    return torch.from_numpy(np.zeros(size, np.uint8)).view(dtype).view(shape)


@dataclass(frozen=True, eq=False)
class Batch:
    """One step's tokens of all its rows, end to end, and where their keys and values live.

    `token_ids` and `positions` are int64 `[tokens]`. `slots` int64 `[tokens]` says where each token's
    key and value go: `page * page_size + offset`. `layout.seq_lens` counts a row's keys with this
    step's tokens. Where every row brings equally many tokens (a decode step: one) leave
    `layout.cu_seqlens_q` None, and attention sees q as `[batch, q_len, heads, head_dim]`; else it is
    the running sum of the rows' tokens, and q is packed. With `prompts`, `layout` has the first rows, of
    one token each, and `prompts` the others, packed: each goes to the kernel that is made for it.
    `logits_at` int64 `[n]` are the indices of the tokens whose logits are wanted, or None for all. With
    `picks` int64 `[tokens]`, token i's id is `token_ids[picks[i]]`, of any number of `token_ids`. All
    tensors are on the model's device; the forward pass reads none of them on the host, given the layouts'
    `max_q_len` (where packed) and `max_kv_len`.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    layout: Paged
    logits_at: torch.Tensor | None
    kv_cache: KvTensors
    attention_kernel: str = "auto"
    linear_kernel: str = "auto"
    picks: torch.Tensor | None = None
    prompts: Paged | None = None

    @property
    def ids(self) -> torch.Tensor:
        """Each token's id, `[tokens]`."""
        return self.token_ids if self.picks is None else self.token_ids.index_select(0, self.picks)

    def wanted(self, x: torch.Tensor) -> torch.Tensor:
        """The rows of x `[tokens, ...]` whose logits are wanted."""
        return x if self.logits_at is None else x.index_select(0, self.logits_at)

    def attend(
        self,
        index: int,
        q: torch.Tensor,
        window: tuple[int, int] = (UNLIMITED, UNLIMITED),
        scale: float | None = None,
    ) -> torch.Tensor:
        """Causal attention of layer `index`: q `[tokens, q_heads, head_dim]` → `[tokens, q_size]`."""
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        if self.prompts is None:
            self._attend(index, q, self.layout, window, scale, out)
        else:
            ahead = len(self.layout.seq_lens)
            self._attend(index, q[:ahead], self.layout, window, scale, out[:ahead])
            self._attend(index, q[ahead:], self.prompts, window, scale, out[ahead:])
        return out.view(len(q), -1)

    def _attend(
        self,
        index: int,
        q: torch.Tensor,
        layout: Paged,
        window: tuple[int, int],
        scale: float | None,
        out: torch.Tensor,
    ) -> None:
        if layout.cu_seqlens_q is None:
            q, out = (x.view(len(layout.seq_lens), -1, *x.shape[1:]) for x in (q, out))
        options = Options(causal=True, window=window, scale=scale, layout=layout)
        api.run(q, *self.kv_cache.layers[index], self.attention_kernel, options, out)
