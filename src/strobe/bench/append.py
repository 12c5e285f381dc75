"""Times `ops.cache.append_rotated`, one launch a layer, beside a plain copy of what it moves."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from strobe.attention.cases import Case
from strobe.bench.results import Row
from strobe.bench.timer import Clock, GraphClock, HostClock, in_turns
from strobe.ops import cache, rope

TOKENS = (1, 8, 64, 256, 512, 2048)
"""Of a call: decode batches, and a prompt's chunk."""
_THETA = 500000.0
_CACHES_BYTES = 192 << 20
"""Calls rotate among sets of tensors that together outgrow any L2 cache."""
_IN_L2_BYTES = 16 << 20
"""Inputs of up to this much are still in L2 when the projection that wrote them ends."""


@dataclass(frozen=True)
class _Set:
    """One call's tensors: `qkv` `[tokens, q_heads + 2 kv_heads, head_dim]`, `copied` room for as much."""

    qkv: torch.Tensor
    copied: torch.Tensor
    turn: tuple[torch.Tensor, torch.Tensor]
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    slots: torch.Tensor
    positions: torch.Tensor

    @property
    def qk(self) -> torch.Tensor:
        return self.qkv[:, : -self.k_pages.shape[-2]]

    @property
    def v(self) -> torch.Tensor:
        return self.qkv[:, -self.k_pages.shape[-2] :]

    def append(self, options: cache.Options) -> torch.Tensor:
        given = (self.qk, self.v, self.turn, self.k_pages, self.v_pages, self.slots)
        return cache.append_rotated(*given, options)

    def copy(self) -> torch.Tensor:
        return self.copied.copy_(self.qkv)

    @property
    def moved(self) -> int:
        """Fewest bytes of an append: all inputs read once, queries, keys and values written once."""
        return 2 * self.qkv.nbytes + sum(t.nbytes for t in self.turn) + self.slots.nbytes


@dataclass(frozen=True)
class _Way:
    """What is timed, and how far it is from the right answer."""

    provider: str
    call: Callable[[_Set], object]
    moved: int
    error: float
    error_allowed: float


def measure(shape: Case, tokens: Sequence[int], dtype: torch.dtype, device: str) -> Iterator[Row]:
    """Rows for each number of tokens, of `shape`'s heads and pages, timed in turns: appended in turn, on a
    GPU settled too, and the same queries, keys and values copied by torch as they are.

    The cache always comes from memory. On a GPU the inputs stand in L2, as in a step, where the projection
    has just written them, and, in rows of their own, in memory like the cache.
    """
    frequencies = [_THETA ** (-2 * pair / shape.head_dim) for pair in range(shape.head_dim // 2)]
    for count, inputs in itertools.product(tokens, ("l2", "memory") if device == "cuda" else ("memory",)):
        sets = [_draw(shape, count, dtype, device, frequencies)]
        if inputs == "l2" and sets[0].qkv.nbytes > _IN_L2_BYTES:
            continue
        while device == "cuda" and len(sets) < 24 and sum(each.moved for each in sets) < _CACHES_BYTES:
            drawn = _draw(shape, count, dtype, device, frequencies)
            sets.append(replace(drawn, qkv=sets[0].qkv) if inputs == "l2" else drawn)
        ways = _ways(sets[0], frequencies)
        right = [way.provider for way in ways if way.error <= way.error_allowed]
        clocks = [_clock(way, sets) for way in ways if way.provider in right]
        timings = dict(zip(right, in_turns(clocks), strict=True))
        for way in ways:
            row: Row = {
                "case": {
                    "op": "append_rotated",
                    "tokens": count,
                    "inputs": inputs,
                    "q_heads": shape.q_heads,
                    "kv_heads": shape.kv_heads,
                    "head_dim": shape.head_dim,
                    "page_size": shape.page_size,
                    "dtype": str(dtype).removeprefix("torch."),
                },
                "provider": way.provider,
                "checked": way.provider in right,
                "error": way.error,
                "error_allowed": way.error_allowed,
            }
            if timing := timings.get(way.provider):
                row |= {"ms": timing.ms, "ms_min": timing.ms_min, "ms_max": timing.ms_max}
                row |= {"bytes": way.moved, "gbps": way.moved / timing.ms * 1e-6}
            yield row


def _ways(given: _Set, frequencies: Sequence[float]) -> list[_Way]:
    ways = []
    for settled in (False, True) if given.qkv.is_cuda else (False,):
        options = cache.Options(settled=settled)
        provider = f"strobe:append_rotated{' settled' if settled else ''}"
        call = partial(_Set.append, options=options)
        ways.append(_Way(provider, call, given.moved, *_errors(given, frequencies, options)))
    wrong = float((given.copy() != given.qkv).sum())
    return [*ways, _Way("torch:copy_", _Set.copy, 2 * given.qkv.nbytes, wrong, 0.0)]


def _clock(way: _Way, sets: Sequence[_Set]) -> Clock:
    calls: list[Callable[[], object]] = [partial(way.call, each) for each in sets]
    return GraphClock(calls) if sets[0].qkv.is_cuda else HostClock(calls[0])


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
    return _Set(qkv, torch.empty_like(qkv), turn, k_pages, v_pages, slots, positions)


def _errors(given: _Set, frequencies: Sequence[float], options: cache.Options) -> tuple[float, float]:
    """Largest difference from the reference over queries and stored keys and values, and what is allowed."""
    q_heads = given.qk.shape[1] - given.v.shape[1]
    wanted = rope.rotate_reference(given.qk, given.positions, frequencies).double()
    if given.qk.is_cuda:
        torch.cuda.synchronize()  # slots, cos and sin are complete
    q = given.append(options)
    k, v = (pages.flatten(0, 1)[given.slots] for pages in (given.k_pages, given.v_pages))
    pairs = ((q, wanted[:, :q_heads]), (k, wanted[:, q_heads:]), (v, given.v.double()))
    error = max(float((a.double() - b).abs().nan_to_num(nan=float("inf")).max()) for a, b in pairs)
    # a product, a sum, cos and sin are each rounded, and so is their angle, in float32
    angle = float(given.positions.max()) * torch.finfo(torch.float32).eps
    return error, (4 * torch.finfo(q.dtype).eps + angle) * float(wanted.abs().max())
