"""What the kernels over a paged or dense cache share: what they refuse, and their tiles.

Dense k and v are pages to them: a row is one, of its own number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from strobe.attention import dense
from strobe.attention.problem import DECODE_MAX_Q_LEN, DTYPE_BYTES, AttentionProblem, Dense, Packed, Paged
from strobe.cuda import jit

HEAD_DIMS = (64, 80, 96, 128, 192, 256)
MAX_PAGE_SIZE = 256
FP8 = "float8_e4m3fn"
SHARED_LIMIT = 227 * 1024
"""Bytes of shared memory that a block may have (compute capability 9.0)."""
_DTYPES = ("bfloat16", "float16")


def refusals(problem: AttentionProblem) -> list[str]:
    reasons = []
    if isinstance(problem.layout, Packed):
        reasons.append("k and v packed; supported: paged, dense")
    elif problem.paged and not 1 <= problem.page_size <= MAX_PAGE_SIZE:
        reasons.append(f"page_size {problem.page_size}; supported: 1 to {MAX_PAGE_SIZE}")
    elif not problem.paged and not problem.kv_len:
        reasons.append("kv_len 0; supported: 1 and up where k and v are dense")
    if not fits(problem.arch):
        reasons.append(
            "needs an NVIDIA GPU with bulk copies and 227 KiB of shared memory a block (9.0, 10.x)"
        )
    if problem.dtype not in _DTYPES:
        reasons.append(f"dtype {problem.dtype}; supported: {', '.join(_DTYPES)}")
    elif problem.kv_dtype not in (problem.dtype, FP8):
        reasons.append(f"cache in {problem.kv_dtype}; supported: q's dtype, {FP8}")
    if problem.head_dim not in HEAD_DIMS:
        reasons.append(f"head_dim {problem.head_dim}; supported: {', '.join(map(str, HEAD_DIMS))}")
    if problem.q_len > DECODE_MAX_Q_LEN:
        reasons.append(f"q_len {problem.q_len}; supported: up to {DECODE_MAX_Q_LEN}")
    return reasons


@dataclass(frozen=True)
class Tiles:
    """What a kernel is compiled for.

    A tile is `keys` keys of one key head; a block reads `heads` key heads side by side for
    `column_tiles` * 8 query rows of each, and each of its warps holds `stages` tiles of K and V.
    `page_size` is 0 where k and v are dense. `settled` is the layout's promise: lengths, page numbers and old
    keys are read before the kernel ahead has ended.
    """

    head_dim: int
    group: int
    page_size: int
    dtype: str = "bfloat16"
    kv_dtype: str = "bfloat16"
    softcap: bool = False
    sinks: bool = False
    column_tiles: int = 1
    keys: int = 16
    heads: int = 1
    warps: int = 8
    stages: int = 3
    settled: bool = False

    @property
    def columns(self) -> int:
        return 8 * self.column_tiles

    @property
    def row_bytes(self) -> int:
        return DTYPE_BYTES[self.kv_dtype] * self.head_dim

    @property
    def swizzle(self) -> int:
        """Bytes that the copy engine swizzles over, or 0: rows stand as they are."""
        return next((span for span in (128, 64, 32) if self.row_bytes % span == 0), 0)

    @property
    def run(self) -> int:
        """Keys in one bulk copy: they stand in one page and one tile."""
        return math.gcd(self.page_size, self.keys)

    @property
    def shares_bytes(self) -> int:
        """`Shared`: what the warps leave of a segment, their barriers, an integer a warp."""
        shares = 4 * self.warps * self.columns * (self.head_dim + 4 + 2)
        return up(shares + 8 * self.warps * self.stages + 4 * self.warps, 16)

    @property
    def rings_bytes(self) -> int:
        """All tiles of all warps."""
        runs = self.keys // self.run * up(self.run * self.row_bytes, 128)
        tile = up(runs, 1024 if self.swizzle else 128)
        return 2 * self.warps * self.stages * tile

    def defines(self) -> dict[str, jit.Define]:
        return {
            "HEAD_DIM": self.head_dim,
            "GROUP": self.group,
            "PAGE_SIZE": self.page_size,
            "scalar_t": jit.SCALAR[self.dtype],
            "kv_t": jit.SCALAR.get(self.kv_dtype, "u8"),
            "SOFTCAP": self.softcap,
            "SINKS": self.sinks,
            "COLUMN_TILES": self.column_tiles,
            "KEYS": self.keys,
            "HEADS": self.heads,
            "WARPS": self.warps,
            "STAGES": self.stages,
            "SETTLED": self.settled,
        }


def up(n: int, multiple: int) -> int:
    """`n` rounded up to a multiple."""
    return -(-n // multiple) * multiple


def tiles(problem: AttentionProblem) -> Tiles:
    """The problem's tiles, with the defaults for heads, warps and stages."""
    rows = problem.group * problem.q_len
    return Tiles(
        problem.head_dim,
        problem.group,
        problem.page_size,
        problem.dtype,
        problem.kv_dtype or problem.dtype,
        problem.softcap > 0,
        problem.sinks is not None,
        column_tiles=1 if rows <= 8 or problem.head_dim > 192 else 2,
        settled=isinstance(problem.layout, Paged) and problem.layout.settled,
    )


def example(
    batch: int, group: int, head_dim: int, dtype: str, kv_dtype: str | None, page_size: int = 16
) -> AttentionProblem:
    """Of the kind that is compiled ahead: one query a row over pages (0: dense), 8 key heads."""
    return AttentionProblem(
        *(batch, 1, 1, 8 * group, 8, head_dim, dtype),
        kv_dtype=kv_dtype,
        layout=Paged(None, None) if page_size else Dense(),
        page_size=page_size,
    )


def fits(arch: int) -> bool:
    """Bulk copies, and shared memory for the warps' rings."""
    return arch >= 90 and dense.shared_memory(arch) >= SHARED_LIMIT
