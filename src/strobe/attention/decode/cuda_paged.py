"""The production rung: one launch reads every key and value once, as fast as memory gives them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from strobe.attention import dense, paged
from strobe.attention.paged_launch import PagedLaunch, Params
from strobe.attention.problem import AttentionProblem, Paged
from strobe.cuda import driver, jit
from strobe.cuda.lasting import lasting
from strobe.device import gpu

IDEA = "the keys of all rows and heads cut evenly among the SMs, each warp streams its own tiles, one launch"

MAX_BATCH = 4096
READS_SETTLED = True
_SOURCE = Path(__file__).with_suffix(".cu")
_SMS = 132
"""What shapes that are compiled ahead are chosen for."""
_MOST_BLOCKS = 511
"""`WorkList` (work_list.cuh) counts its workers in nine bits."""


def refusals(problem: AttentionProblem) -> list[str]:
    reasons = paged.refusals(problem)
    if problem.batch > MAX_BATCH:
        reasons.append(f"batch {problem.batch}; supported: up to {MAX_BATCH}")
    return reasons


@dataclass(frozen=True)
class Shape(paged.Tiles):
    """What the kernel is compiled for."""

    @property
    def partial_bytes(self) -> int:
        """`Partial` of partials.cuh."""
        return 6 * self.heads * self.columns * self.head_dim

    def shared_bytes(self, batch: int) -> int:
        """The warps' rings, what `gather` adds up, the rows' lengths, the block's number."""
        return self.rings_bytes + self.shares_bytes + 4 * (2 * batch + 2)


def choose_shape(problem: AttentionProblem, sms: int = _SMS) -> Shape:
    """The shape that is fastest by measurement (docs/log.md)."""
    return _choose(Shape(**vars(paged.tiles(problem))), problem.kv_heads, problem.batch, sms)


@lru_cache(maxsize=4096)
def _choose(shape: Shape, kv_heads: int, batch: int, sms: int) -> Shape:
    """As many stages as fit, for 8 warps or else 4, and the heads."""
    room = paged.up(batch, 64)
    fitting = (
        replace(shape, warps=warps, stages=stages)
        for warps, fewest in ((8, 2), (4, 1))
        for stages in range(8, fewest - 1, -1)
    )
    shape = next(each for each in fitting if each.shared_bytes(room) <= paged.SHARED_LIMIT)
    return replace(shape, heads=_heads(shape, kv_heads, batch, sms))


def _heads(shape: Shape, kv_heads: int, batch: int, sms: int) -> int:
    """Heads side by side read longer rows and leave fewer segments, but a merge reads more.

    They pay where a block then has one segment to itself, or about two, of which few are merged if lengths
    are equal, and two of them where most segments need no merge anyway.
    """
    fitting = [heads for heads in (1, 2, 4, 8) if kv_heads % heads == 0 and shape.warps % heads == 0]
    for each in (1, 2):
        for heads in fitting:
            blocks = kv_heads * batch / heads / each
            if sms * 15 / 16 <= blocks <= sms:
                return heads
    many = 256 if shape.row_bytes >= 256 else 64
    return 2 if 2 in fitting and kv_heads * batch >= many else 1


def suits(problem: AttentionProblem) -> bool:
    """Not where several blocks of query rows read dense keys again, and a kernel that reads them once, by a
    block a key head, fills the GPU too. µs on an H200 (`cuda_async`'s): 64 rows of 4k, 32/8 heads, 16
    queries 975 (330), 4 queries 245 (244); 8 rows of 300, 8 queries 9.7 (14.0). Not measured over pages.
    """
    row_blocks = -(-problem.group * problem.q_len // paged.tiles(problem).columns)
    return problem.paged or row_blocks == 1 or problem.batch * problem.kv_heads * row_blocks < _SMS


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
    device = q.get_device()
    sms = min(_MOST_BLOCKS, gpu(device).sm_count)
    shape = shape or choose_shape(problem, sms)
    params = Params.of(problem, shape)
    blocks = _blocks(sms, problem.batch * params.segments)
    kernel = jit.kernel(_SOURCE, "attend", shape.defines(), device)

    def launch(args: list[Any]) -> jit.Launch:
        return kernel.prepare(
            grid=blocks,
            block=32 * shape.warps,
            args=args,
            shared_bytes=shape.shared_bytes(problem.batch),
            programmatic=True,
        )

    size, layout = 3 * blocks * shape.partial_bytes + 16, problem.layout  # KINDS of partials.cuh
    captured = layout.scratch if isinstance(layout, Paged) else dense.captured

    def partials(stream: int) -> torch.Tensor:
        return _partials(captured, device, stream, size, blocks)

    return PagedLaunch(problem, shape, params, q, launch, partials)


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
    batch, float16, and a float8 cache at 128 and, whose rows are not swizzled, at 80; dense at 128."""
    if not paged.fits(jit.arch_number(arch)):
        return []
    examples = (
        *((1, 4, head_dim, "bfloat16", None) for head_dim in paged.HEAD_DIMS),
        *((1, group, 128, "bfloat16", None) for group in (1, 8, 16)),
        *((64, 4, head_dim, "bfloat16", None) for head_dim in (64, 128)),
        (1, 4, 128, "float16", None),
        *((batch, 4, 128, "bfloat16", paged.FP8) for batch in (1, 64)),
        (1, 4, 80, "bfloat16", paged.FP8),
    )
    dense_examples = (paged.example(1, group, 128, "bfloat16", None, page_size=0) for group in (1, 4))
    problems = (*(paged.example(*each) for each in examples), *dense_examples)
    shapes = dict.fromkeys(map(choose_shape, problems))
    return [source(shape) for shape in shapes]


_per_stream: dict[Any, torch.Tensor] = {}


def _partials(captured: dict[Any, Any], device: int, stream: int, size: int, blocks: int) -> torch.Tensor:
    """Room for the blocks' partials and the counter that numbers them, which every launch leaves as it found
    them: all bits one, or for the counter where the next launch of as many blocks begins.

    One a stream, so that launches on several do not meet. A CUDA graph under capture gets its own, kept in
    `captured`: the graph empties it, and it lives in the graph's memory. No other graph may use it, which
    could be replayed before this one and would find it unwritten.
    """

    def empty() -> torch.Tensor:
        return torch.full((size,), 0xFF, dtype=torch.uint8, device=f"cuda:{device}")

    key: Any
    if stream and torch.cuda.is_current_stream_capturing():  # the default stream, 0, cannot be captured
        key = "cuda_paged", _capture_id(stream), size, blocks
        if captured is dense.captured and any(other[1] != key[1] for other in captured):
            captured.clear()
        if key not in captured:
            captured[key] = empty()
        return captured[key]
    key = device, stream, size, blocks
    if key not in _per_stream:
        _per_stream[key] = lasting(empty, device)
    return _per_stream[key]


def _capture_id(stream: int) -> object:
    """Tells the capture under way on a stream from every other; new at each call if the driver is mute."""
    status, *found = driver.bindings().cuStreamGetCaptureInfo(stream)
    return object() if status.value else int(found[1])


def _blocks(sms: int, segments: int) -> int:
    """One block an SM, or up to a sixteenth less where, lengths being equal, a segment then has blocks of its
    own: one that ends a segment and begins another is late for both. Where a block has two segments the idle
    SMs cost more (64 rows of 1k, 32 key heads, in turn: 247.8 µs by 128 blocks, 245.4 by 132)."""
    even = (n for n in range(sms, sms - sms // 16 - 1, -1) if n % segments == 0)
    return next(even, sms)
