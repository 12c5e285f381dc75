"""How the kernels over a paged or dense cache are launched: parameter, maps, one launch for many calls."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from threading import Lock
from typing import Any

import torch

from strobe.attention.paged import Tiles
from strobe.attention.plan import contiguous_strides
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
    """Calls of one problem on tensors of one signature, q's among them: packed once, only addresses change.

    `scratch`, where there is one, is asked at each call for the kernel's partials, on a stream.
    """

    def __init__(
        self,
        problem: AttentionProblem,
        tiles: Tiles,
        params: Params,
        q: torch.Tensor,
        launch: Callable[[list[Any]], jit.Launch],
        scratch: Callable[[int], torch.Tensor] | None = None,
    ) -> None:
        self._tiles, self._params, self._scratch = tiles, params, scratch
        self._sinks, self._dense = problem.sinks, not problem.paged
        self._launch = launch([jit.TensorMap(), jit.TensorMap(), params])
        self._maps: dict[tuple[str, int], jit.TensorMap | None] = {}
        self._first: dict[str, jit.TensorMap] = {}
        self._lock = Lock()
        self._device, self._stream_of = q.get_device(), torch._C._cuda_getCurrentRawStream
        self._out_strides = problem.q_heads * problem.head_dim, problem.head_dim
        self._q_strides = _token_strides(q)
        params.out_token_stride, params.out_head_stride = self._out_strides
        lse_strides = contiguous_strides(problem.lse_shape(q.shape[0]))
        params.lse_row_stride, params.lse_head_stride = lse_strides[0], lse_strides[-2]

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
        params, q_strides = self._params, self._q_strides
        if q_strides is None or q.data_ptr() % 4:
            q, q_strides = q.clone(memory_format=torch.contiguous_format), self._out_strides
        sinks = None if self._sinks is None else self._sinks.float().contiguous()
        k_map, v_map = self._map("k", k), self._map("v", v)
        if k_map is None or v_map is None:
            k, v = (x.clone(memory_format=torch.contiguous_format) for x in (k, v))
            k_map, v_map = tensor_map("k", k, self._tiles), tensor_map("v", v, self._tiles)
        stream = self._stream_of(self._device)
        with self._lock:
            params.q, params.out = q.data_ptr(), out.data_ptr()
            params.q_token_stride, params.q_head_stride = q_strides
            params.sinks = None if sinks is None else sinks.data_ptr()
            params.lse = None if lse is None else lse.data_ptr()
            if self._scratch is not None:
                params.partials = self._scratch(stream).data_ptr()
            self._launch.point(0, ctypes.addressof(k_map))
            self._launch.point(1, ctypes.addressof(v_map))
            self._launch.on(stream)

    def _map(self, name: str, pages: torch.Tensor) -> jit.TensorMap | None:
        """None: dense, and not as bulk copies can read it."""
        address = pages.data_ptr()
        try:
            return self._maps[name, address]
        except KeyError:
            pass
        found, first = None, self._first.get(name)
        if first is not None and not address % 16:
            found = jit.moved(first, address)
        elif not self._dense or _readable(pages):
            found = self._first[name] = tensor_map(name, pages, self._tiles)
        if len(self._maps) >= _MAPS:
            self._maps = {}
        self._maps[name, address] = found
        return found


def _token_strides(q: torch.Tensor) -> tuple[int, int] | None:
    """How far apart tokens and heads are; None where q must be copied: features are read in pairs."""
    tokens = q.flatten(0, -3)
    token, head, _ = tokens.stride()
    return None if tokens.data_ptr() != q.data_ptr() or (token | head) % 2 else (token, head)


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
