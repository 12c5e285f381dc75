"""The production rung: one launch reads every key and value once, as fast as memory gives them."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, cast

import torch

from strobe.attention import dense
from strobe.attention.problem import DTYPE_BYTES, AttentionProblem, Paged
from strobe.cuda import jit
from strobe.device import gpu
from strobe.errors import ProblemError

IDEA = "the keys of all rows and heads cut evenly among the SMs, each warp streams its own tiles, one launch"

HEAD_DIMS = (64, 80, 96, 128, 192, 256)
MAX_Q_LEN = 16
MAX_PAGE_SIZE = 256
MAX_BATCH = 4096
_SOURCE = Path(__file__).with_suffix(".cu")
_DTYPES = ("bfloat16", "float16")
_FP8 = "float8_e4m3fn"
_SHARED_LIMIT = 227 * 1024


def refusals(problem: AttentionProblem) -> list[str]:
    reasons = []
    if not problem.paged:
        reasons.append("needs a paged cache")
    elif not 1 <= problem.page_size <= MAX_PAGE_SIZE:
        reasons.append(f"page_size {problem.page_size}; supported: 1 to {MAX_PAGE_SIZE}")
    if not _fits(problem.arch):
        reasons.append(
            "needs an NVIDIA GPU with bulk copies and 227 KiB of shared memory a block (9.0, 10.x)"
        )
    if problem.dtype not in _DTYPES:
        reasons.append(f"dtype {problem.dtype}; supported: {', '.join(_DTYPES)}")
    elif problem.kv_dtype not in (problem.dtype, _FP8):
        reasons.append(f"cache in {problem.kv_dtype}; supported: q's dtype, {_FP8}")
    if problem.kv_dtype == _FP8 and problem.head_dim % 32:
        reasons.append(f"head_dim {problem.head_dim} with a cache in {_FP8}; supported: multiples of 32")
    if problem.head_dim not in HEAD_DIMS:
        reasons.append(f"head_dim {problem.head_dim}; supported: {', '.join(map(str, HEAD_DIMS))}")
    if problem.q_len > MAX_Q_LEN:
        reasons.append(f"q_len {problem.q_len}; supported: up to {MAX_Q_LEN}")
    if problem.batch > MAX_BATCH:
        reasons.append(f"batch {problem.batch}; supported: up to {MAX_BATCH}")
    return reasons


@dataclass(frozen=True)
class Shape:
    """What the kernel is compiled for.

    A tile is `keys` keys of one key head; a block reads `heads` key heads side by side for
    `column_tiles` * 8 query rows of each, and each of its warps holds `stages` tiles of K and V.
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

    @property
    def columns(self) -> int:
        return 8 * self.column_tiles

    @property
    def row_bytes(self) -> int:
        return DTYPE_BYTES[self.kv_dtype] * self.head_dim

    @property
    def span(self) -> int:
        """Bytes that the copy engine swizzles over."""
        return next(span for span in (128, 64, 32) if self.row_bytes % span == 0)

    @property
    def run(self) -> int:
        """Keys in one bulk copy: they stand in one page and one tile."""
        return math.gcd(self.page_size, self.keys)

    @property
    def partial_bytes(self) -> int:
        """`Partial` of cuda_paged.cu."""
        return 4 * self.heads * self.columns * (self.head_dim + 2)

    def shared_bytes(self, batch: int) -> int:
        """The warps' rings, what `gather` adds up, the rows' lengths."""
        tile = _up(self.keys // self.run * _up(self.run * self.row_bytes, 128), 1024)
        gathered = 4 * self.warps * self.columns * (self.head_dim + 4 + 2)
        shared = _up(gathered + 8 * self.warps * self.stages + 4 * self.warps, 16)
        return 2 * self.warps * self.stages * tile + shared + 4 * (2 * batch + 1)

    def defines(self) -> dict[str, jit.Define]:
        return {
            "HEAD_DIM": self.head_dim,
            "GROUP": self.group,
            "PAGE_SIZE": self.page_size,
            "scalar_t": dense.SCALAR[self.dtype],
            "kv_t": dense.SCALAR.get(self.kv_dtype, "u8"),
            "SOFTCAP": self.softcap,
            "SINKS": self.sinks,
            "COLUMN_TILES": self.column_tiles,
            "KEYS": self.keys,
            "HEADS": self.heads,
            "WARPS": self.warps,
            "STAGES": self.stages,
        }


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def choose_shape(problem: AttentionProblem) -> Shape:
    """The shape that is fastest by measurement (docs/log.md)."""
    rows = problem.group * problem.q_len
    return _choose(
        Shape(
            problem.head_dim,
            problem.group,
            problem.page_size,
            problem.dtype,
            problem.kv_dtype or problem.dtype,
            problem.softcap > 0,
            problem.sinks is not None,
            column_tiles=1 if rows <= 8 or problem.head_dim > 192 else 2,
        ),
        problem.kv_heads,
        problem.batch,
    )


@lru_cache(maxsize=4096)
def _choose(shape: Shape, kv_heads: int, batch: int) -> Shape:
    """The heads, warps and stages of a shape.

    Two heads side by side read longer rows and halve the segments, but double what a merge reads:
    they pay where most segments need none. Then as many stages as fit, for 8 warps or else 4.
    """
    many = 256 if shape.row_bytes >= 256 else 64
    heads = 2 if kv_heads % 2 == 0 and kv_heads * batch >= many else 1
    room = _up(batch, 64)
    fitting = (
        replace(shape, heads=heads, warps=warps, stages=stages)
        for warps, fewest in ((8, 2), (4, 1))
        for stages in range(8, fewest - 1, -1)
    )
    return next(each for each in fitting if each.shared_bytes(room) <= _SHARED_LIMIT)


def run(
    problem: AttentionProblem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    shape: Shape | None = None,
) -> None:
    """k and v are pages, on 16 bytes and in strides of multiples of 16 bytes.

    Raises:
        ProblemError: other strides.
    """
    shape = shape or choose_shape(problem)
    device, layout = q.get_device(), cast(Paged, problem.layout)
    row_blocks = -(-problem.group * problem.q_len // shape.columns)
    segments = problem.kv_heads // shape.heads * row_blocks
    blocks = _blocks(_sm_count(device), problem.batch * segments)
    params = _params(problem, q.reshape(-1, *q.shape[-2:]), out.view(-1, *out.shape[-2:]), lse)
    params.segments, params.row_blocks = segments, row_blocks
    params.partials = _partials(layout, q.device, 2 * blocks * shape.partial_bytes).data_ptr()
    sinks = None if problem.sinks is None else problem.sinks.float().contiguous()
    params.sinks = None if sinks is None else sinks.data_ptr()
    jit.kernel(_SOURCE, "attend", shape.defines(), device)(
        grid=blocks,
        block=32 * shape.warps,
        args=[_tensor_map("k", k, shape), _tensor_map("v", v, shape), params],
        shared_bytes=shape.shared_bytes(problem.batch),
        programmatic=True,
    )


def sources(arch: str) -> list[jit.Source]:
    """One query a row over pages of 16: bfloat16 at every head_dim, the common groups at 128, a large
    batch, float16, and a float8 cache."""
    if not _fits(int("".join(digit for digit in arch if digit.isdigit()))):
        return []
    shapes = dict.fromkeys(
        choose_shape(
            AttentionProblem(
                *(batch, 1, 1, 8 * group, 8, head_dim, dtype),
                kv_dtype=kv_dtype,
                layout=Paged(None, None),
                page_size=16,
            )
        )
        for batch, group, head_dim, dtype, kv_dtype in (
            *((1, 4, head_dim, "bfloat16", None) for head_dim in HEAD_DIMS),
            *((1, group, 128, "bfloat16", None) for group in (1, 8, 16)),
            *((64, 4, head_dim, "bfloat16", None) for head_dim in (64, 128)),
            (1, 4, 128, "float16", None),
            *((batch, 4, 128, "bfloat16", _FP8) for batch in (1, 64)),
        )
    )
    return [jit.Source(_SOURCE, shape.defines()) for shape in shapes]


def _fits(arch: int) -> bool:
    """Bulk copies, and shared memory for what `choose_shape` fills."""
    return arch >= 90 and dense.shared_memory(arch) >= _SHARED_LIMIT


class _Params(ctypes.Structure):
    """`Params` of cuda_paged.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "out", "lse", "seq_lens", "page_table", "cu_seqlens_q")),
        *((name, ctypes.c_void_p) for name in ("sinks", "k_scale", "v_scale", "partials")),
        *((f"{name}_stride", ctypes.c_int64) for name in ("q_token", "q_head", "out_token", "out_head")),
        *((f"{name}_stride", ctypes.c_int64) for name in ("lse_row", "lse_head")),
        *((name, ctypes.c_int) for name in ("batch", "segments", "q_len", "row_blocks", "table_stride")),
        *((name, ctypes.c_int) for name in ("left", "right")),
        *((name, ctypes.c_float) for name in ("scale_log2", "softcap_log2", "softcap_scale")),
    ]


def _params(
    problem: AttentionProblem, q: torch.Tensor, out: torch.Tensor, lse: torch.Tensor | None
) -> _Params:
    """All but `segments`, `row_blocks`, `partials` and `sinks`. q and out are `[tokens, heads, head_dim]`."""
    layout, scale = cast(Paged, problem.layout), problem.scale or 0.0
    params = _Params(
        q=q.data_ptr(),
        out=out.data_ptr(),
        seq_lens=layout.seq_lens.data_ptr(),
        page_table=layout.page_table.data_ptr(),
        q_token_stride=q.stride(0),
        q_head_stride=q.stride(1),
        out_token_stride=out.stride(0),
        out_head_stride=out.stride(1),
        batch=problem.batch,
        q_len=problem.q_len,
        table_stride=layout.page_table.stride(0),
        left=problem.window[0],
        right=problem.window[1],
        scale_log2=scale * math.log2(math.e),
        softcap_log2=problem.softcap * math.log2(math.e),
        softcap_scale=scale / problem.softcap if problem.softcap else 0.0,
    )
    if layout.cu_seqlens_q is not None:
        params.cu_seqlens_q = layout.cu_seqlens_q.data_ptr()
    if layout.k_scale is not None and layout.v_scale is not None:
        params.k_scale, params.v_scale = layout.k_scale.data_ptr(), layout.v_scale.data_ptr()
    if lse is not None:
        params.lse = lse.data_ptr()
        params.lse_row_stride, params.lse_head_stride = lse.stride(0), lse.stride(-2)
    return params


def _tensor_map(name: str, pages: torch.Tensor, shape: Shape) -> jit.TensorMap:
    """Pages as `[pages, kv_heads, page_size, spans, span]`; a box is one run of keys of one head.

    No promotion in L2: fetching 256 bytes for each request of 128 costs 5 % of the bandwidth.
    """
    count, page_size, kv_heads, _ = pages.shape
    size = pages.element_size()
    page, token, head = (stride * size for stride in pages.stride()[:3])
    if any(stride % 16 for stride in (page, token, head)) or pages.data_ptr() % 16:
        raise ProblemError(
            f"{name}'s pages, tokens and heads are {page}, {token} and {head} bytes apart; "
            "supported: multiples of 16, on 16 bytes"
        )
    span, spans = shape.span // size, shape.row_bytes // shape.span
    return jit.tensor_map(
        pages.data_ptr(),
        str(pages.dtype).removeprefix("torch."),
        (span, spans, page_size, kv_heads, count),
        (shape.span, token, head, page),
        (span, spans, shape.run, 1, 1),
        swizzle=shape.span,
        l2_promotion=0,
    )


_per_stream: dict[Any, torch.Tensor] = {}


def _partials(layout: Paged, where: torch.device, size: int) -> torch.Tensor:
    """Room for the blocks' partials, which every launch leaves empty: all bits one.

    One a stream, so that launches on several do not meet. A CUDA graph under capture gets its own, kept
    with the layout: the graph empties it, and it lives in the graph's memory. No other graph may use it,
    which could be replayed before this one and would find it unwritten.
    """
    kept: dict[Any, torch.Tensor] = _per_stream
    stream = torch.cuda.current_stream(where).cuda_stream
    key: Any = (where, stream, size)
    if torch.cuda.is_current_stream_capturing():
        kept, key = layout.scratch, ("cuda_paged", _capture_id(stream), size)
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
