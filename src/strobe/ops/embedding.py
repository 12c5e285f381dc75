"""What a rotary network's step begins with: its tokens' rows of the embedding, and what turns their heads."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F

from strobe.cuda import jit
from strobe.ops import kernels, rope

_SOURCE = Path(__file__).with_suffix(".cu")
_THREADS = 256


def embed(
    token_ids: torch.Tensor,
    table: torch.Tensor,
    positions: torch.Tensor,
    signed_frequencies: torch.Tensor,
    picks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """x `[tokens, hidden]` of the table's rows, and `rope.angles` of the positions in its dtype.

    table `[vocab, hidden]`; token_ids and positions int64 `[tokens]`. With picks int64 `[tokens]`, token i is
    `token_ids[picks[i]]`. On a GPU this is one launch, of our own.
    """
    if table.is_cuda:
        tokens, head_dim = positions.shape[0], signed_frequencies.shape[-1]
        launch = _plan(kernels.kind_of(table), tokens, head_dim)
        if launch is not None:
            x = table.new_empty(tokens, table.shape[1])
            cos, sin = (table.new_empty(tokens, 1, head_dim) for _ in range(2))
            given = (positions, table, signed_frequencies, x, cos, sin)
            picked = 0 if picks is None else picks.data_ptr()
            launch(token_ids.data_ptr(), picked, *(tensor.data_ptr() for tensor in given))
            return x, (cos, sin)
    if picks is not None:
        token_ids = token_ids.index_select(0, picks)
    return F.embedding(token_ids, table), rope.angles(positions, signed_frequencies, table.dtype)


def sources(arch: str) -> list[jit.Source]:
    return [jit.Source(_SOURCE, {"scalar_t": scalar}) for scalar in kernels.SCALAR.values()]


@lru_cache(kernels.PLANS)
def _plan(table: kernels.Kind, tokens: int, head_dim: int) -> kernels.Prepared | None:
    """The kernel's launch, and None where torch is to run it."""
    if kernels.refusals(table, table.columns) or not tokens:
        return None
    kernel = jit.kernel(_SOURCE, "embed", {"scalar_t": kernels.SCALAR[table.dtype]}, table.device.index)
    args = [*[None] * 8, ctypes.c_int(table.columns), ctypes.c_int(head_dim)]
    programmatic = kernels.programmatic(table.device)
    return kernels.Prepared(kernel.prepare(tokens, _THREADS, args, programmatic=programmatic))
