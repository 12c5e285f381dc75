"""Decode with no plan and no scratch: a cluster of blocks for each key head, merged in shared memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from strobe.attention import paged
from strobe.attention.paged_launch import PagedLaunch, Params
from strobe.attention.problem import AttentionProblem
from strobe.cuda import jit

IDEA = "a cluster of SMs a key head, its tiles dealt out, merged through distributed shared memory"

MAX_BATCH = 65535
READS_SETTLED = True
_SOURCE = Path(__file__).with_suffix(".cu")
_HALF_AN_SM = 113 * 1024
_LARGEST = 16
"""Blocks of a cluster."""
_SMS = 128
"""That one row shall keep busy. Not the device's own number: a row's bits follow from the cluster's size."""


def refusals(problem: AttentionProblem) -> list[str]:
    reasons = paged.refusals(problem)
    if problem.batch > MAX_BATCH:
        reasons.append(f"batch {problem.batch}; supported: up to {MAX_BATCH}")
    return reasons


def suits(problem: AttentionProblem) -> bool:
    """One query of one row whose keys are few for each block of a cluster.

    Settled, 32/8 heads take 3.8 µs at 1k keys (`cuda_paged` 4.9), 6.8 at 4k (8.5), 11.5 at 8k (11.7), but
    23.1 at 16k (19.1); 32/32 heads 6.8 at 1k (6.9), 10.7 at 2k (10.3). In turn 32/8 heads take 7.1 at 2k
    (7.5), 10.1 at 4k (9.7), with head_dim 64 6.2 (6.4); 32/32 heads 6.0 at 512 (6.4), 9.1 at 1k (8.6).
    Eight rows of 1k take 23.1 (11.7).

    Of a captured graph `kv_len` is what its page table has room for, so that the graph of a wider table may
    round otherwise.
    """
    if problem.batch > 1 or problem.q_len > 1:
        return False
    shape = choose_shape(problem)
    most = 64 * 1024
    if shape.settled:
        most *= 4 if shape.cluster == _LARGEST else 2
    return 2 * problem.kv_len * shape.row_bytes <= shape.cluster * most


@dataclass(frozen=True)
class Shape(paged.Tiles):
    """What the kernel is compiled for, and the blocks of a cluster: 1 to 16.

    `blocks` of this size are meant to share an SM. `windowed`: a window hides old keys.
    """

    blocks: int = 2
    windowed: bool = False
    cluster: int = _LARGEST

    def shared_bytes(self) -> int:
        """The rings and in their place what the warps leave, barriers, what the blocks push."""
        shares = 4 * self.warps * self.columns * (self.head_dim + 4 + 2)
        barriers = 8 * (self.warps * self.stages + 1)
        parts = 24 * paged.up(self.columns * self.head_dim // 4, self.cluster * 2 * self.warps)
        return max(self.rings_bytes, paged.up(shares, 16)) + paged.up(barriers, 16) + parts

    def defines(self) -> dict[str, jit.Define]:
        return {**super().defines(), "BLOCKS": self.blocks, "WINDOWED": self.windowed}


def choose_shape(problem: AttentionProblem) -> Shape:
    """The same for every batch, so that a row's bits depend on its own length alone."""
    shape = Shape(**vars(paged.tiles(problem)), windowed=problem.window[0] >= 0)
    return _choose(shape, problem.kv_heads * -(-problem.group * problem.q_len // shape.columns))


@lru_cache(maxsize=4096)
def _choose(shape: Shape, segments: int) -> Shape:
    """As many blocks a segment as one row needs to fill the GPU; as many stages as fit in half an SM for 4
    warps, or else in a whole one: the other half is for another row, or for the kernel behind."""
    cluster = next(size for size in (_LARGEST, 8, 4, 2, 1) if size * segments <= _SMS or size == 1)
    fitting = (
        replace(shape, warps=4, stages=stages, blocks=blocks, cluster=cluster)
        for blocks, room, fewest in ((2, _HALF_AN_SM, 2), (1, paged.SHARED_LIMIT, 1))
        for stages in range(8, fewest - 1, -1)
        if replace(shape, warps=4, stages=stages).shared_bytes() <= room
    )
    return next(fitting)


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
    kernel = jit.kernel(_SOURCE, "attend", shape.defines(), q.get_device())
    kernel.prefer_shared_memory()  # for blocks that share an SM
    params = Params.of(problem, shape)

    def launch(args: list[Any]) -> jit.Launch:
        return kernel.prepare(
            grid=(shape.cluster, params.segments, problem.batch),
            block=32 * shape.warps,
            args=args,
            shared_bytes=shape.shared_bytes(),
            cluster=shape.cluster,
            programmatic=True,
        )

    return PagedLaunch(problem, shape, params, q, launch)


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
    """One query a row over pages of 16: bfloat16 at every head_dim and the common groups at 128, and a float8
    cache at 128 and, whose rows are not swizzled, at 80; dense at 128."""
    if not paged.fits(jit.arch_number(arch)):
        return []
    examples = (
        *((1, 4, head_dim, "bfloat16", None) for head_dim in paged.HEAD_DIMS),
        *((1, group, 128, "bfloat16", None) for group in (1, 8, 16)),
        *((1, 4, head_dim, "bfloat16", paged.FP8) for head_dim in (80, 128)),
    )
    dense_examples = (paged.example(1, group, 128, "bfloat16", None, page_size=0) for group in (1, 4))
    problems = (*(paged.example(*each) for each in examples), *dense_examples)
    shapes = dict.fromkeys(replace(choose_shape(problem), cluster=1) for problem in problems)
    return [source(shape) for shape in shapes]
