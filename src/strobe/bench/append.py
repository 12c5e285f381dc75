"""Times `ops.cache.append_rotated`, one launch a layer, against the time that its bytes alone would take."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from strobe.attention.cases import Case
from strobe.bench.results import Row
from strobe.bench.timer import Clock, GraphClock, HostClock, in_turns
from strobe.ops import cache, rope

_THETA = 500000.0
_CACHES_BYTES = 192 << 20
"""Calls rotate among sets of inputs that together outgrow any L2 cache."""


@dataclass(frozen=True)
class _Set:
    """One call's tensors."""

    qk: torch.Tensor
    v: torch.Tensor
    turn: tuple[torch.Tensor, torch.Tensor]
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    slots: torch.Tensor
    positions: torch.Tensor

    def call(self, options: cache.Options | None = None) -> torch.Tensor:
        given = (self.qk, self.v, self.turn, self.k_pages, self.v_pages, self.slots)
        return cache.append_rotated(*given, options)

    @property
    def moved(self) -> int:
        """Fewest bytes: all inputs read once, queries, keys and values written once."""
        written = self.qk.nbytes + self.v.nbytes
        return self.qk.nbytes + self.v.nbytes + sum(t.nbytes for t in self.turn) + self.slots.nbytes + written


def measure(shape: Case, tokens: Sequence[int], dtype: torch.dtype, device: str) -> Iterator[Row]:
    """A row for each number of tokens, of `shape`'s heads and pages: in turn; on a GPU settled too."""
    frequencies = [_THETA ** (-2 * pair / shape.head_dim) for pair in range(shape.head_dim // 2)]
    for count, settled in itertools.product(tokens, (False, True) if device == "cuda" else (False,)):
        options = cache.Options(settled=settled)
        first = _draw(shape, count, dtype, device, frequencies)
        error, allowed = _errors(first, frequencies, options)
        row: Row = {
            "case": {
                "op": "append_rotated",
                "tokens": count,
                "q_heads": shape.q_heads,
                "kv_heads": shape.kv_heads,
                "head_dim": shape.head_dim,
                "page_size": shape.page_size,
                "dtype": str(dtype).removeprefix("torch."),
            },
            "provider": f"strobe:append_rotated{' settled' if settled else ''}",
            "checked": error <= allowed,
            "error": error,
            "error_allowed": allowed,
        }
        if row["checked"]:
            clock: Clock = HostClock(partial(first.call, options))
            if device == "cuda":
                sets = [first]
                while len(sets) < 24 and sum(each.moved for each in sets) < _CACHES_BYTES:
                    sets.append(_draw(shape, count, dtype, device, frequencies))
                calls: list[Callable[[], object]] = [partial(each.call, options) for each in sets]
                clock = GraphClock(calls)
            (timing,) = in_turns([clock])
            row |= {"ms": timing.ms, "ms_min": timing.ms_min, "ms_max": timing.ms_max}
            row |= {"bytes": first.moved, "gbps": first.moved / timing.ms * 1e-6}
        yield row


def _draw(shape: Case, tokens: int, dtype: torch.dtype, device: str, frequencies: Sequence[float]) -> _Set:
    heads, size = shape.q_heads + shape.kv_heads, shape.page_size
    pages = -(-4 * tokens // size) + 1

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, device=device).to(dtype)

    positions = torch.randint(0, 4096, (tokens,), device=device)
    turn = rope.angles(positions, rope.signed(frequencies, device), dtype)
    slots = torch.randperm(pages * size, device=device)[:tokens]
    k_pages, v_pages = (normal(pages, size, shape.kv_heads, shape.head_dim) for _ in range(2))
    qkv = normal(tokens, heads + shape.kv_heads, shape.head_dim)
    qk, v = qkv.split_with_sizes((heads, shape.kv_heads), 1)
    return _Set(qk, v, turn, k_pages, v_pages, slots, positions)


def _errors(given: _Set, frequencies: Sequence[float], options: cache.Options) -> tuple[float, float]:
    """Largest difference from the reference over queries and stored keys and values, and what is allowed."""
    q_heads = given.qk.shape[1] - given.v.shape[1]
    wanted = rope.rotate_reference(given.qk, given.positions, frequencies).double()
    if given.qk.is_cuda:
        torch.cuda.synchronize()  # slots, cos and sin are complete
    q = given.call(options)
    k, v = (pages.flatten(0, 1)[given.slots] for pages in (given.k_pages, given.v_pages))
    pairs = ((q, wanted[:, :q_heads]), (k, wanted[:, q_heads:]), (v, given.v.double()))
    error = max(float((a.double() - b).abs().nan_to_num(nan=float("inf")).max()) for a, b in pairs)
    # a product, a sum, cos and sin are each rounded, and so is their angle, in float32
    angle = float(given.positions.max()) * torch.finfo(torch.float32).eps
    return error, (4 * torch.finfo(q.dtype).eps + angle) * float(wanted.abs().max())
