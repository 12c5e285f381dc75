"""The production rung: one launch reads every key and value once, as fast as memory gives them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, cast

import torch

from strobe.attention import paged
from strobe.attention.paged_launch import PagedLaunch, Params
from strobe.attention.problem import AttentionProblem, Paged
from strobe.cuda import jit
from strobe.device import gpu

IDEA = "the keys of all rows and heads cut evenly among the SMs, each warp streams its own tiles, one launch"

MAX_BATCH = 4096
_SOURCE = Path(__file__).with_suffix(".cu")
_HINT_LINES = 2048
"""Most lines of 128 bytes of a page table that are asked for before its rows' lengths are known."""


def refusals(problem: AttentionProblem) -> list[str]:
    reasons = paged.refusals(problem)
    if problem.batch > MAX_BATCH:
        reasons.append(f"batch {problem.batch}; supported: up to {MAX_BATCH}")
    return reasons


@dataclass(frozen=True)
class Shape(paged.Tiles):
    """What the kernel is compiled for. `tickets` numbers the blocks as they start."""

    tickets: bool = False

    @property
    def partial_bytes(self) -> int:
        """`Partial` of cuda_paged.cu."""
        return 4 * self.heads * self.columns * (self.head_dim + 2)

    def shared_bytes(self, batch: int) -> int:
        """The warps' rings, what `gather` adds up, the rows' lengths, a ticket."""
        return self.rings_bytes + self.shares_bytes + 4 * (2 * batch + 1 + self.tickets)

    def defines(self) -> dict[str, jit.Define]:
        return {**super().defines(), "TICKETS": self.tickets}


def choose_shape(problem: AttentionProblem) -> Shape:
    """The shape that is fastest by measurement (docs/log.md)."""
    return _choose(Shape(**asdict(paged.tiles(problem))), problem.kv_heads, problem.batch)


@lru_cache(maxsize=4096)
def _choose(shape: Shape, kv_heads: int, batch: int) -> Shape:
    """The heads, warps and stages of a shape.

    Two heads side by side read longer rows and halve the segments, but double what a merge reads:
    they pay where most segments need none. Then as many stages as fit, for 8 warps or else 4.
    """
    many = 256 if shape.row_bytes >= 256 else 64
    heads = 2 if kv_heads % 2 == 0 and kv_heads * batch >= many else 1
    room = paged.up(batch, 64)
    fitting = (
        replace(shape, heads=heads, warps=warps, stages=stages)
        for warps, fewest in ((8, 2), (4, 1))
        for stages in range(8, fewest - 1, -1)
    )
    return next(each for each in fitting if each.shared_bytes(room) <= paged.SHARED_LIMIT)


def source(shape: Shape) -> jit.Source:
    """What is compiled for a shape."""
    return jit.Source(_SOURCE, shape.defines())


def prepare(
    problem: AttentionProblem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    shape: Shape | None = None,
) -> PagedLaunch:
    """`run` of this problem, for tensors like these."""
    shape = shape or choose_shape(problem)
    device, layout = q.get_device(), cast(Paged, problem.layout)
    params = Params.of(problem, shape)
    blocks = _blocks(_sm_count(device), problem.batch * params.segments)
    lines = -(-layout.page_table.shape[0] * layout.page_table.stride(0) // 32)
    params.hint_lines = lines if lines <= _HINT_LINES else 0
    kernel = jit.kernel(_SOURCE, "attend", shape.defines(), device)

    def launch(args: list[Any]) -> jit.Launch:
        return kernel.prepare(
            grid=blocks,
            block=32 * shape.warps,
            args=args,
            shared_bytes=shape.shared_bytes(problem.batch),
            programmatic=True,
        )

    where = q.device
    return PagedLaunch(problem, shape, params, launch, lambda: _partials(layout, where, shape, blocks))


def run(
    problem: AttentionProblem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    shape: Shape | None = None,
) -> None:
    """Arguments and errors as `PagedLaunch`."""
    prepare(problem, q, k, v, shape)(q, k, v, out, lse)


def sources(arch: str) -> list[jit.Source]:
    """One query a row over pages of 16: bfloat16 at every head_dim, the common groups at 128, a large
    batch, float16, and a float8 cache."""
    if not paged.fits(int("".join(digit for digit in arch if digit.isdigit()))):
        return []
    examples = (
        *((1, 4, head_dim, "bfloat16", None) for head_dim in paged.HEAD_DIMS),
        *((1, group, 128, "bfloat16", None) for group in (1, 8, 16)),
        *((64, 4, head_dim, "bfloat16", None) for head_dim in (64, 128)),
        (1, 4, 128, "float16", None),
        *((batch, 4, 128, "bfloat16", paged.FP8) for batch in (1, 64)),
    )
    shapes = dict.fromkeys(choose_shape(paged.example(*each)) for each in examples)
    return [source(shape) for shape in shapes]


_per_stream: dict[Any, torch.Tensor] = {}


def _partials(layout: Paged, where: torch.device, shape: Shape, blocks: int) -> torch.Tensor:
    """Room for the blocks' partials and the tickets' counter, which every launch leaves as it found them:
    all bits one, or for the counter where the next launch of as many blocks begins.

    One a stream, so that launches on several do not meet. A CUDA graph under capture gets its own, kept
    with the layout: the graph empties it, and it lives in the graph's memory. No other graph may use it,
    which could be replayed before this one and would find it unwritten.
    """
    size = 2 * blocks * shape.partial_bytes + 16
    kept: dict[Any, torch.Tensor] = _per_stream
    stream = torch.cuda.current_stream(where).cuda_stream
    key: Any = (where, stream, size, blocks)
    if torch.cuda.is_current_stream_capturing():
        kept, key = layout.scratch, ("cuda_paged", _capture_id(stream), size, blocks)
    if key not in kept:
        kept[key] = torch.full((size,), 0xFF, dtype=torch.uint8, device=where)
    return kept[key]


def _capture_id(stream: int) -> object:
    """Tells the capture under way on a stream from every other; new at each call if the driver is mute."""
    from cuda.bindings import driver

    status, *found = driver.cuStreamGetCaptureInfo(stream)
    return object() if status.value else int(found[1])


def _blocks(sms: int, segments: int) -> int:
    """One block an SM, or a few less where each segment of an even batch then has blocks of its own: a
    block that ends one segment and begins another is late for both."""
    own = sms // segments * segments
    return own if own * 16 >= sms * 15 else sms


@cache
def _sm_count(device: int) -> int:
    return min(511, gpu(device).sm_count)
