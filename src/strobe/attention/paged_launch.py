"""How the kernels over a paged or dense cache are launched: parameter, maps, one launch for many calls."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from threading import Lock
from typing import Any

import torch

from strobe.attention.paged import Tiles
from strobe.attention.problem import AttentionProblem, Paged
from strobe.cuda import jit
from strobe.errors import ProblemError

_LOG2E = math.log2(math.e)
_MAPS = 512
"""Tensor maps that a launch keeps of the caches that it meets: layers, mostly."""


class Params(ctypes.Structure):
    """`Params` of attend_tile.cuh."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "out", "lse", "seq_lens", "page_table", "cu_seqlens_q")),
        *((name, ctypes.c_void_p) for name in ("sinks", "k_scale", "v_scale", "partials")),
        *((f"{name}_stride", ctypes.c_int64) for name in ("q_token", "q_head", "out_token", "out_head")),
        *((f"{name}_stride", ctypes.c_int64) for name in ("lse_row", "lse_head")),
        *((name, ctypes.c_int) for name in ("batch", "segments", "q_len", "row_blocks", "table_stride")),
        *((name, ctypes.c_int) for name in ("left", "right")),
        *((name, ctypes.c_float) for name in ("scale_log2", "softcap_log2", "softcap_scale")),
        *((name, ctypes.c_int) for name in ("table_columns", "kv_len")),
    ]

    @classmethod
    def of(cls, problem: AttentionProblem, tiles: Tiles) -> Params:
        """What the problem and its layout decide: all but q, out, lse, sinks and `partials`."""
        layout, scale = problem.layout, problem.scale
        row_blocks = -(-problem.group * problem.q_len // tiles.columns)
        params = cls(
            batch=problem.batch,
            segments=problem.kv_heads // tiles.heads * row_blocks,
            q_len=problem.q_len,
            row_blocks=row_blocks,
            left=problem.window[0],
            right=problem.window[1],
            scale_log2=scale * _LOG2E,
            softcap_log2=problem.softcap * _LOG2E,
            softcap_scale=scale / problem.softcap if problem.softcap else 0.0,
            kv_len=problem.kv_len,
        )
        if not isinstance(layout, Paged):
            return params
        params.seq_lens, params.page_table = layout.seq_lens.data_ptr(), layout.page_table.data_ptr()
        params.table_stride, params.table_columns = layout.page_table.stride(0), layout.page_table.shape[1]
        if layout.cu_seqlens_q is not None:
            params.cu_seqlens_q = layout.cu_seqlens_q.data_ptr()
        if layout.k_scale is not None and layout.v_scale is not None:
            params.k_scale, params.v_scale = layout.k_scale.data_ptr(), layout.v_scale.data_ptr()
        return params


class PagedLaunch:
    """Calls of one problem on tensors of one signature: packed once, only addresses change.

    `scratch`, where there is one, is asked at each call for the kernel's partials.
    """

    def __init__(
        self,
        problem: AttentionProblem,
        tiles: Tiles,
        params: Params,
        launch: Callable[[list[Any]], jit.Launch],
        scratch: Callable[[], torch.Tensor] | None = None,
    ) -> None:
        self._tiles, self._params, self._scratch = tiles, params, scratch
        self._sinks, self._dense = problem.sinks, not problem.paged
        self._launch = launch([jit.TensorMap(), jit.TensorMap(), params])
        self._maps: dict[tuple[str, int], jit.TensorMap | None] = {}
        self._lock = Lock()

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor | None,
    ) -> None:
        """Pages stand on 16 bytes, in strides of multiples of 16 bytes; dense k and v that do not are copied.

        Raises:
            ProblemError: pages in other strides.
        """
        params = self._params
        q, out = q.reshape(-1, *q.shape[-2:]), out.view(-1, *out.shape[-2:])
        token, head, _ = q.stride()
        if (token | head) % 2 or q.data_ptr() % 4:  # features are read in pairs
            q = q.clone(memory_format=torch.contiguous_format)
        sinks = None if self._sinks is None else self._sinks.float().contiguous()
        k_map, v_map = self._map("k", k), self._map("v", v)
        if k_map is None or v_map is None:
            k, v = (x.clone(memory_format=torch.contiguous_format) for x in (k, v))
            k_map, v_map = tensor_map("k", k, self._tiles), tensor_map("v", v, self._tiles)
        with self._lock:
            params.q, params.out = q.data_ptr(), out.data_ptr()
            params.q_token_stride, params.q_head_stride, _ = q.stride()
            params.out_token_stride, params.out_head_stride, _ = out.stride()
            params.sinks = None if sinks is None else sinks.data_ptr()
            params.lse = None if lse is None else lse.data_ptr()
            if lse is not None:
                params.lse_row_stride, params.lse_head_stride = lse.stride(0), lse.stride(-2)
            if self._scratch is not None:
                params.partials = self._scratch().data_ptr()
            self._launch.point(0, ctypes.addressof(k_map))
            self._launch.point(1, ctypes.addressof(v_map))
            self._launch()

    def _map(self, name: str, pages: torch.Tensor) -> jit.TensorMap | None:
        """None: dense, and not as bulk copies can read it."""
        key = name, pages.data_ptr()
        try:
            return self._maps[key]
        except KeyError:
            pass
        copied = self._dense and not _readable(pages)
        found = None if copied else tensor_map(name, pages, self._tiles)
        if len(self._maps) >= _MAPS:
            self._maps = {}
        self._maps[key] = found
        return found


def tensor_map(name: str, pages: torch.Tensor, tiles: Tiles) -> jit.TensorMap:
    """Pages as `[pages, kv_heads, page_size, spans, span]`; a box is one run of keys of one head.

    No promotion in L2: fetching 256 bytes for each request of 128 costs 5 % of the bandwidth.
    """
    count, page_size, kv_heads, _ = pages.shape
    size = pages.element_size()
    page, token, head = _bytes_apart(pages)
    if not _readable(pages):
        raise ProblemError(
            f"{name}'s pages, tokens and heads are {page}, {token} and {head} bytes apart; "
            "supported: multiples of 16, on 16 bytes"
        )
    span_bytes = tiles.swizzle or tiles.row_bytes
    span, spans = span_bytes // size, tiles.row_bytes // span_bytes
    return jit.tensor_map(
        pages.data_ptr(),
        str(pages.dtype).removeprefix("torch."),
        (span, spans, page_size, kv_heads, count),
        (span_bytes, token, head, page),
        (span, spans, tiles.run, 1, 1),
        swizzle=tiles.swizzle,
        l2_promotion=0,
    )


def _readable(pages: torch.Tensor) -> bool:
    """Whether bulk copies can read them: on 16 bytes, in strides of multiples of 16, nothing expanded."""
    return not pages.data_ptr() % 16 and all(apart and not apart % 16 for apart in _bytes_apart(pages))


def _bytes_apart(pages: torch.Tensor) -> tuple[int, int, int]:
    """Pages, tokens and heads. Of one alone any distance will do, but the driver checks it."""
    page, token, head = (
        stride * pages.element_size() if count > 1 else 16
        for count, stride in zip(pages.shape[:3], pages.stride(), strict=False)
    )
    return page, token, head
