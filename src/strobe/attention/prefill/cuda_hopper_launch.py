"""How cuda_hopper.cu is launched: its parameters, its tensor maps, the counters that tiles are drawn from."""

from __future__ import annotations

import ctypes
import math
from functools import cache, partial
from typing import Any

import torch

from strobe.attention.problem import AttentionProblem, Packed, Paged
from strobe.cuda import jit
from strobe.cuda.driver import relaxed_capture
from strobe.cuda.lasting import lasting

ROWS = 64
"""Queries of a consumer."""
_LOG2E = math.log2(math.e)


class Params(ctypes.Structure):
    """`Params` of hopper_work.cuh."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("out", "lse", "sinks", "cu_seqlens_q", "cu_seqlens_kv")),
        *((name, ctypes.c_void_p) for name in ("seq_lens", "page_table", "next_tile")),
        *((f"out_{name}_stride", ctypes.c_longlong) for name in ("batch", "row", "head")),
        *((f"lse_{name}_stride", ctypes.c_longlong) for name in ("batch", "head")),
        *((name, ctypes.c_int) for name in ("q_tiles", "heads", "section")),
        *((name, ctypes.c_int) for name in ("q_heads", "group", "q_len", "kv_len", "pages_per_row")),
        *((name, ctypes.c_int) for name in ("left", "right", "zero")),
        *((name, ctypes.c_float) for name in ("scale_log2", "softcap_scale")),
    ]

    @classmethod
    def of(cls, problem: AttentionProblem, q_tile: int, section: int) -> Params:
        """What the problem and the size of a tile of queries decide; addresses and strides are to come."""
        scale = problem.scale
        left, right = problem.bounds
        return cls(
            q_tiles=-(-problem.q_len // q_tile),
            heads=problem.batch * problem.q_heads,
            section=section,
            q_heads=problem.q_heads,
            group=problem.group,
            q_len=problem.q_len,
            kv_len=problem.kv_len,
            left=left,
            right=right,
            scale_log2=(problem.softcap or scale) * _LOG2E,
            softcap_scale=scale / problem.softcap if problem.softcap else 0.0,
        )

    def lay_out(self, out: tuple[int, ...], lse: tuple[int, ...]) -> None:
        """Strides of out `[batch, row, head, dim]` and lse `[batch, head, row]`; packed: no batch."""
        *batch, self.out_row_stride, self.out_head_stride, _ = out
        self.out_batch_stride = sum(batch)
        *batch, self.lse_head_stride, _ = lse
        self.lse_batch_stride = sum(batch)

    def attach(self, problem: AttentionProblem) -> list[torch.Tensor]:
        """Take the addresses of sinks and of the layout's tensors; returns the copies that this took."""
        wanted: dict[str, Any] = {}
        layout = problem.layout
        if problem.sinks is not None:
            wanted["sinks"] = problem.sinks
        if isinstance(layout, Packed):
            wanted |= {"cu_seqlens_q": layout.cu_seqlens_q, "cu_seqlens_kv": layout.cu_seqlens_kv}
        elif isinstance(layout, Paged):
            wanted |= {"page_table": layout.page_table, "seq_lens": layout.seq_lens}
            if layout.cu_seqlens_q is not None:
                wanted["cu_seqlens_q"] = layout.cu_seqlens_q
        copies = []
        for name, tensor in wanted.items():
            right = tensor.float() if name == "sinks" else tensor
            right = right if right.stride(-1) == 1 else right.contiguous()
            setattr(self, name, right.data_ptr())
            if name == "page_table":
                self.pages_per_row = right.stride(0)
            if right is not tensor:
                copies.append(right)
        return copies


class Launch:
    """One problem's launches for tensors of given shapes and strides: one for each set of addresses met.

    `maps` are of q, k, v and, where the copy engine stores it too, of out. What is packed once is written no
    more, so threads share it; where addresses come back, as they do layer by layer and step by step, a call
    only looks them up.
    """

    MOST = 256

    def __init__(self, kernel: jit.Kernel, params: Params, maps: tuple[Maps, ...], **shape: Any) -> None:
        self._device, self._params = kernel.device, params
        self._q, self._k, self._v = maps[:3]
        self._out = maps[3] if len(maps) > 3 else None
        unset = jit.TensorMap()
        self._like = kernel.prepare(args=[unset, unset, unset, params, unset], **shape).like
        self._counters = counters(kernel.device)
        self._stream_of = torch._C._cuda_getCurrentRawStream
        self._capturing = torch._C._cuda_isCurrentStreamCapturing
        self._packed: dict[tuple[int, ...], jit.Launch] = {}

    def run(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor | None
    ) -> None:
        """Launch on torch's current stream, the device being current.

        Raises:
            OffSixteenBytes: q, k or v.
        """
        stream = self._stream_of(self._device)
        lse_at = lse.data_ptr() if lse is not None else 0
        at = stream, q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), lse_at
        if stream and self._capturing():  # the default stream, 0, cannot be captured
            launch = self._pack(*at, self._counters.captured())
        else:
            try:
                launch = self._packed[at]
            except KeyError:
                if len(self._packed) >= self.MOST:
                    self._packed.clear()
                launch = self._packed[at] = self._pack(*at, self._counters[stream])
        launch.on(stream)

    def _pack(self, stream: int, q: int, k: int, v: int, out: int, lse: int, next_tile: int) -> jit.Launch:
        params = Params.from_buffer_copy(self._params)
        params.out, params.lse, params.next_tile = out, lse, next_tile
        # keys that are not there are q's, whose map is never read
        q_map = self._q[q]
        out_map = q_map if self._out is None else self._out[out]
        return self._like([q_map, self._k[k or q], self._v[v or q], params, out_map])


class OffSixteenBytes(Exception):
    """An address that the copy engine takes no tensor at."""


class Maps(dict[int, jit.TensorMap]):
    """Tensor maps of tensors that differ in nothing but their address, by it.

    Boxes of `rows` rows of one head of `[batch or page, row, head, dim]` or packed `[row, head, dim]`:
    `whole` rows, as panels of 64 columns (32 where 64 does not divide head_dim) one after the other, or
    one panel. A row of a panel is what the copy engine swizzles.
    """

    MOST = 256

    def __init__(
        self,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        rows: int,
        whole: bool = True,
    ) -> None:
        head_dim = shape[-1]
        panel = 32 if head_dim % 64 else 64
        sizes, apart = _dimensions(shape, strides, panel)
        self._arguments = (
            str(dtype).removeprefix("torch."),
            sizes,
            apart,
            (panel, rows, head_dim // panel if whole else 1, 1, 1),
        )
        self._swizzle = 2 * panel

    def __missing__(self, address: int) -> jit.TensorMap:
        if address % 16:
            raise OffSixteenBytes
        if len(self) >= self.MOST:
            self.clear()
        made = self[address] = jit.tensor_map(address, *self._arguments, swizzle=self._swizzle)
        return made


def readable(tensor: torch.Tensor) -> bool:
    """Whether the copy engine can read it: rows on 16 bytes, no dimension expanded."""
    apart = _dimensions(tensor.shape, tensor.stride(), 32 if tensor.shape[-1] % 64 else 64)[1]
    return not tensor.data_ptr() % 16 and all(n and not n % 16 for n in apart)


def _dimensions(
    shape: tuple[int, ...], strides: tuple[int, ...], panel: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes in elements, and how far apart in bytes: within a panel, rows, panels, heads, batch."""
    missing = 4 - len(shape)
    batch, length, heads, head_dim = (1,) * missing + tuple(shape)
    batch_stride, row_stride, head_stride, _ = (0,) * missing + tuple(strides)
    sizes = (panel, length, head_dim // panel, heads, batch)
    elements = (row_stride, panel, head_stride, batch_stride)
    # The driver checks the stride even of a dimension of one element.
    apart = tuple(2 * n if size > 1 else 16 for size, n in zip(sizes[1:], elements, strict=True))
    return sizes, apart


class Counters(dict[int, int]):
    """A device's zeroed int32s: stream → its counter's address. A launch draws its tiles from one, and leaves
    it zeroed.

    Launches of one stream share theirs, since they follow one another. A captured launch may be
    replayed beside any stream, so it has one for itself, which is never given back.
    """

    COUNT, BYTES_APART = 4096, 32

    def __init__(self, device: int) -> None:
        self._device = device
        self._slabs: list[torch.Tensor] = []
        self._free: list[int] = []

    def __missing__(self, stream: int) -> int:
        """A counter for a stream that is not being captured."""
        if len(self._free) < self.COUNT // 2:
            self._add()
        return self.setdefault(stream, self._free.pop())

    def captured(self) -> int:
        """The address of a counter that no other launch has; zeroed in the graph where none is left."""
        return self._free.pop() if self._free else self._zeros(1).data_ptr()

    def _add(self) -> None:
        slab = lasting(partial(self._zeros, self.COUNT), self._device)
        with relaxed_capture():  # of other streams
            torch.cuda.current_stream(self._device).synchronize()
        self._slabs.append(slab)
        self._free += range(slab.data_ptr(), slab.data_ptr() + slab.nbytes, self.BYTES_APART)

    def _zeros(self, count: int) -> torch.Tensor:
        return torch.zeros(count, self.BYTES_APART // 4, dtype=torch.int32, device=f"cuda:{self._device}")


@cache
def counters(device: int) -> Counters:
    """Those of a device."""
    return Counters(device)
