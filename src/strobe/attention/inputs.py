"""From tensors to a problem, and every way in which the inputs of attention() can be wrong, by name.

Shapes, dtypes and devices are checked always. Lengths and page numbers are checked where they can be
read without waiting: on a CPU. On a GPU they are the caller's word.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from strobe.attention.problem import AttentionProblem, Dense, Layout, Options, Packed, Paged
from strobe.device import gpu
from strobe.errors import ProblemError

DTYPE_NAMES = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float8_e4m3fn: "float8_e4m3fn",
}


def check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None) -> None:
    """Raises ProblemError unless q, k, v and sinks are tensors that belong to one call."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, torch.Tensor):
            raise ProblemError(f"{name} is a {type(tensor).__name__}; supported: torch.Tensor")
        if tensor.dtype not in DTYPE_NAMES or (tensor is q and q.dtype == torch.float8_e4m3fn):
            supported = ", ".join(DTYPE_NAMES.values()) + " (k and v only)"
            raise ProblemError(f"{name} has dtype {tensor.dtype}; supported: {supported}")
        if tensor.is_meta:
            raise ProblemError(f"{name} is on meta, which holds no data; supported: a CPU or a GPU")
        if tensor.device != q.device:
            raise ProblemError(f"{name} is on {tensor.device}, q on {q.device}; supported: one device")
        if tensor.dim() and tensor.numel() and tensor.stride(-1) != 1:
            raise ProblemError(f"{name}'s last dimension is not contiguous", hint=f"pass {name}.contiguous()")
    if k.dtype != v.dtype:
        raise ProblemError(f"k has dtype {k.dtype}, v {v.dtype}; supported: one dtype")
    if k.dtype != q.dtype and k.dtype != torch.float8_e4m3fn:
        supported = "one dtype, or k and v in float8_e4m3fn"
        raise ProblemError(f"q has dtype {q.dtype}, k {k.dtype}; supported: {supported}")
    if k.shape != v.shape:
        raise ProblemError(f"k is {list(k.shape)}, v {list(v.shape)}; supported: equal shapes")
    if sinks is None:
        return
    if not isinstance(sinks, torch.Tensor):
        raise ProblemError(f"sinks is a {type(sinks).__name__}; supported: torch.Tensor")
    if sinks.shape != q.shape[-2:-1] or sinks.device != q.device or not sinks.is_floating_point():
        given = f"{list(sinks.shape)} {sinks.dtype} on {sinks.device}"
        raise ProblemError(f"sinks is {given}; supported: [q_heads], floating point, on {q.device}")


def check_bias(bias: torch.Tensor, q: torch.Tensor, scores: tuple[int, int, int, int]) -> None:
    """Raises ProblemError unless `bias` can be added to scores of this shape."""
    if not isinstance(bias, torch.Tensor):
        raise ProblemError(f"bias is a {type(bias).__name__}; supported: torch.Tensor")
    fits = bias.dim() <= 4 and all(
        given in (1, wanted) for given, wanted in zip(reversed(bias.shape), reversed(scores), strict=False)
    )
    if not fits or not bias.is_floating_point() or bias.device != q.device:
        given = f"{bias.dtype} {list(bias.shape)} on {bias.device}"
        supported = f"floating point, broadcastable to {list(scores)}, on {q.device}"
        raise ProblemError(f"bias is {given}; supported: {supported}")


def sizes(q: torch.Tensor, k: torch.Tensor, layout: Layout) -> tuple[int, int, int]:
    """(batch, longest q_len, longest kv_len) of tensors that fit the layout.

    Raises:
        ProblemError: they do not fit it.
    """
    if not isinstance(layout, (Dense, Packed, Paged)):
        raise ProblemError(f"layout is {layout!r:.60}; supported: Dense(), Packed(...), Paged(...)")
    packed_q = isinstance(layout, Packed) or (isinstance(layout, Paged) and layout.cu_seqlens_q is not None)
    _expect_dims("q", q, 3 if packed_q else 4, layout)
    _expect_dims("k", k, 3 if isinstance(layout, Packed) else 4, layout)
    if q.shape[-1] != k.shape[-1]:
        raise ProblemError(f"head_dim of q is {q.shape[-1]}, of k {k.shape[-1]}; supported: equal")
    if isinstance(layout, Packed):
        return _packed_sizes(q, k, layout)
    if isinstance(layout, Paged):
        return _paged_sizes(q, k, layout, packed_q)
    if q.shape[0] != k.shape[0]:
        raise ProblemError(f"batch of q is {q.shape[0]}, of k {k.shape[0]}; supported: equal")
    return q.shape[0], q.shape[1], k.shape[1]


def _packed_sizes(q: torch.Tensor, k: torch.Tensor, layout: Packed) -> tuple[int, int, int]:
    _check_index("cu_seqlens_q", layout.cu_seqlens_q, 1, q)
    _check_index("cu_seqlens_kv", layout.cu_seqlens_kv, 1, q)
    if len(layout.cu_seqlens_q) != len(layout.cu_seqlens_kv) or len(layout.cu_seqlens_q) < 1:
        given = (len(layout.cu_seqlens_q), len(layout.cu_seqlens_kv))
        raise ProblemError(
            f"cu_seqlens_q and cu_seqlens_kv have {given} entries; supported: batch + 1 in both"
        )
    if q.device.type == "cpu":
        _check_sums("cu_seqlens_q", layout.host_q, q.shape[0])
        _check_sums("cu_seqlens_kv", layout.host_kv, k.shape[0])
    return (
        len(layout.cu_seqlens_q) - 1,
        _longest("max_q_len", layout.max_q_len, q, lambda: _differences(layout.host_q)),
        _longest("max_kv_len", layout.max_kv_len, q, lambda: _differences(layout.host_kv)),
    )


def _paged_sizes(q: torch.Tensor, k: torch.Tensor, layout: Paged, packed_q: bool) -> tuple[int, int, int]:
    _check_index("page_table", layout.page_table, 2, q)
    _check_index("seq_lens", layout.seq_lens, 1, q)
    _check_scales(layout, k)
    batch = layout.page_table.shape[0]
    if layout.seq_lens.shape[0] != batch or (not packed_q and q.shape[0] != batch):
        rows = (q.shape[0] if not packed_q else "packed", layout.seq_lens.shape[0], batch)
        raise ProblemError(f"batch of q, seq_lens and page_table is {rows}; supported: equal")
    kv_len = _longest("max_kv_len", layout.max_kv_len, q, lambda: layout.host_lens)
    if kv_len > layout.page_table.shape[1] * k.shape[1]:
        room = layout.page_table.shape[1] * k.shape[1]
        table = list(layout.page_table.shape)
        raise ProblemError(f"a row has {kv_len} keys; page_table {table} holds {room}")
    if q.device.type == "cpu":
        _check_pages(layout, pages=k.shape[0], page_size=k.shape[1])
    if not packed_q:
        return batch, q.shape[1], kv_len
    _check_index("cu_seqlens_q", layout.cu_seqlens_q, 1, q)
    if layout.cu_seqlens_q.shape[0] != batch + 1:
        entries = layout.cu_seqlens_q.shape[0]
        raise ProblemError(f"cu_seqlens_q has {entries} entries; supported: batch + 1 = {batch + 1}")
    if q.device.type == "cpu":
        _check_sums("cu_seqlens_q", layout.host_q or [0], q.shape[0])
    return (
        batch,
        _longest("max_q_len", layout.max_q_len, q, lambda: _differences(layout.host_q or [0])),
        kv_len,
    )


def _check_sums(name: str, sums: list[int], tokens: int) -> None:
    if sums[0] != 0 or sums[-1] > tokens or any(step < 0 for step in _differences(sums)):
        raise ProblemError(f"{name} is {sums!r:.80}; supported: from 0, never falling, up to {tokens} tokens")


def _check_pages(layout: Paged, *, pages: int, page_size: int) -> None:
    lens, table = np.array(layout.host_lens, dtype=np.int64), layout.page_table.numpy()
    if lens.size and lens.min() < 0:
        raise ProblemError(f"seq_lens holds {lens.min()}; supported: 0 and up")
    read = np.arange(table.shape[1]) * page_size < lens[:, None]
    wrong = table[read & ((table < 0) | (table >= pages))]
    if wrong.size:
        raise ProblemError(f"page_table holds page {wrong[0]}; the cache has {pages} pages, from 0")


def _check_scales(layout: Paged, k: torch.Tensor) -> None:
    scales = {"k_scale": layout.k_scale, "v_scale": layout.v_scale}
    if all(scale is None for scale in scales.values()):
        return
    if k.dtype != torch.float8_e4m3fn:
        raise ProblemError(f"k_scale and v_scale with a cache in {k.dtype}; supported: torch.float8_e4m3fn")
    for name, scale in scales.items():
        given, wanted = type(scale).__name__, (torch.float32, [k.shape[2]], k.device)
        if isinstance(scale, torch.Tensor):
            if (scale.dtype, list(scale.shape), scale.device) == wanted and scale.is_contiguous():
                continue
            given = f"{scale.dtype} {list(scale.shape)} on {scale.device}"
        raise ProblemError(f"{name} is {given}; supported: contiguous float32 {wanted[1]} on {k.device}")


def _longest(name: str, given: int | None, q: torch.Tensor, lengths: Callable[[], list[int]]) -> int:
    """The longest row: as `given`, or read off the device."""
    if given is None:
        return max(lengths(), default=0)
    if not isinstance(given, (int, np.integer)) or given < 0:
        raise ProblemError(f"{name} is {given!r:.60}; supported: an integer, 0 and up")
    if q.device.type == "cpu" and given < (longest := max(lengths(), default=0)):
        raise ProblemError(
            f"{name} is {given}, and a row has {longest}; supported: the longest row's, or more"
        )
    return given


def _differences(sums: list[int]) -> list[int]:
    return [b - a for a, b in itertools.pairwise(sums)]


def _expect_dims(name: str, tensor: torch.Tensor, dims: int, layout: Layout) -> None:
    if tensor.dim() != dims:
        raise ProblemError(
            f"{name} is {list(tensor.shape)}; supported: {dims} dimensions "
            f"with layout {type(layout).__name__}"
        )


def _check_index(name: str, tensor: Any, dims: int, q: torch.Tensor) -> None:
    if not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.int32 or tensor.dim() != dims:
        is_tensor = isinstance(tensor, torch.Tensor)
        given = f"{tensor.dtype} {list(tensor.shape)}" if is_tensor else type(tensor).__name__
        plural = "s" if dims > 1 else ""
        raise ProblemError(f"{name} is {given}; supported: an int32 tensor of {dims} dimension{plural}")
    if tensor.device != q.device:
        raise ProblemError(f"{name} is on {tensor.device}, q on {q.device}; supported: one device")
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ProblemError(f"{name}'s last dimension is not contiguous", hint=f"pass {name}.contiguous()")


def describe(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options) -> AttentionProblem:
    """The AttentionProblem of these tensors. Arguments and errors as in `api.attention`."""
    layout = options.layout if options.layout is not None else Dense()
    check_tensors(q, k, v, options.sinks)
    batch, q_len, kv_len = sizes(q, k, layout)
    if options.bias is not None:
        check_bias(options.bias, q, (batch, q.shape[-2], q_len, kv_len))
    return AttentionProblem(
        batch=batch,
        q_len=q_len,
        kv_len=kv_len,
        q_heads=q.shape[-2],
        kv_heads=k.shape[-2],
        head_dim=q.shape[-1],
        dtype=DTYPE_NAMES[q.dtype],
        kv_dtype=DTYPE_NAMES[k.dtype],
        page_size=k.shape[1] if isinstance(layout, Paged) else 0,
        device=q.device.type,
        arch=_arch(q.device),
        **{**options._asdict(), "layout": layout},
    )


def _arch(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return gpu(device.index if device.index is not None else torch.cuda.current_device()).arch
