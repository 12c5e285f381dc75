"""Writing keys and values into their pages: a kernel of our own, of CUDA on a GPU and of numba on a CPU.

What the kernels do not take, torch does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import torch

from strobe.cpu import jit as cpu_jit
from strobe.cuda import jit
from strobe.ops import kernels, rope
from strobe.ops.norm import rms_norm

Turn = tuple[torch.Tensor, torch.Tensor]

_SOURCE = Path(__file__).with_suffix(".cu")
_SCALAR = {torch.float16: "f16", torch.bfloat16: "bf16"}
_THREADS = 192
"""Of a block at most. A token's 48 heads of 128 (32 + 2 x 8) are two such blocks."""


@dataclass(frozen=True, eq=False)
class HeadNorms:
    """RMSNorm of each query's and key's head, before it is rotated: weights `[head_dim]`, and epsilon."""

    q: torch.Tensor
    k: torch.Tensor
    eps: float


@dataclass(frozen=True, eq=False)
class Options:
    """`norms` come before the rotation. `scales` are (k_scale, v_scale) of a float8 cache, float32
    `[kv_heads]`: what is stored is divided by them. `settled` promises that slots, cos and sin were complete
    before the kernel just ahead in the stream started: the CUDA kernel then reads them before that one has
    ended.
    """

    norms: HeadNorms | None = None
    scales: Turn | None = None
    settled: bool = False


class Destination(NamedTuple):
    """Where the keys and values of one layer go, and what happens to heads on the way: the arguments of
    `append_rotated`."""

    turn: Turn
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    slots: torch.Tensor
    options: Options


def append(
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    slots: torch.Tensor,
    options: Options | None = None,
) -> None:
    """Store each token's key and value of one layer, in place.

    k and v `[tokens, kv_heads, head_dim]`; k_pages and v_pages `[pages, page_size, kv_heads, head_dim]`,
    contiguous; slots int64 `[tokens]`, `page * page_size + offset`, each within the cache. Of the options,
    `norms` are not taken.
    """
    options = options or Options()
    if k.is_cuda:
        launch = _plan(_call_of(k, v, k_pages, options, rotates=False))
        if launch is not None:
            launch((k, v, slots, k_pages, v_pages), None, options)
            return
    if k.dtype == v.dtype == k_pages.dtype:
        k_pages.flatten(0, 1).index_copy_(0, slots, k)
        v_pages.flatten(0, 1).index_copy_(0, slots, v)
        return
    for x, pages, scale in zip((k, v), (k_pages, v_pages), options.scales or (None, None), strict=True):
        rows, stored = pages.flatten(0, 1), _stored(x, pages.dtype, scale)
        if pages.dtype == torch.float8_e4m3fn:  # which torch moves as bytes only
            rows, stored = rows.view(torch.uint8), stored.view(torch.uint8)
        rows.index_copy_(0, slots, stored)


def append_rotated(
    qk: torch.Tensor,
    v: torch.Tensor,
    turn: Turn,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    slots: torch.Tensor,
    options: Options | None = None,
) -> torch.Tensor:
    """Rotate queries and keys by their positions, store the keys and the values, and return the queries.

    qk `[tokens, q_heads + kv_heads, head_dim]`; `turn` is `rope.angles`' cos and sin; the options'
    norms come before that; the rest as `append`. Returns `[tokens, q_heads, head_dim]`. On a GPU this is one
    launch, on a CPU with numba one loop.
    """
    options = options or Options()
    q_heads, norms = qk.shape[1] - v.shape[1], options.norms
    if qk.is_cuda:
        launch = _plan(_call_of(qk, v, k_pages, options, rotates=True))
        if launch is not None:
            q = qk.new_empty((qk.shape[0], q_heads, qk.shape[2]))
            launch((qk, v, slots, k_pages, v_pages), (q, *turn), options)
            return q
    if norms is not None:
        q, k = qk.split_with_sizes((q_heads, v.shape[1]), 1)
        qk = torch.cat((rms_norm(q, norms.q, norms.eps), rms_norm(k, norms.k, norms.eps)), 1)
    if _runs_on_cpu(qk, v, turn, k_pages):
        (tokens, _, head_dim), kv_heads = qk.shape, v.shape[1]
        q = qk.new_empty((tokens, q_heads, head_dim))
        given = (qk, v, *turn, slots, k_pages, v_pages, q)
        cpu_jit.kernels("strobe.ops.cache_kernel").append_rotated(
            *[x.data_ptr() for x in given], tokens, q_heads, kv_heads, head_dim, qk.stride(0), v.stride(0)
        )
        return q
    q, k = rope.rotate(qk, *turn).split_with_sizes((q_heads, v.shape[1]), 1)
    append(k, v, k_pages, v_pages, slots, options)
    return q


def sources(arch: str) -> list[jit.Source]:
    floats8 = jit.arch_number(arch) >= 89
    return [
        jit.Source(_SOURCE, _defines(scalar, kv, 128, rotates=rotates, norms=norms, settled=True))
        for scalar in _SCALAR.values()
        for kv in ((scalar, "u8") if floats8 else (scalar,))
        for rotates, norms in ((False, False), (True, False), (True, True))
    ]


class _Append(ctypes.Structure):
    """`Append` of cache.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("k", "v", "q", "k_pages", "v_pages", "cos", "sin", "slots")),
        *((name, ctypes.c_void_p) for name in ("k_scale", "v_scale")),
        *((name, ctypes.c_int64) for name in ("k_token", "k_head", "v_token", "v_head")),
        *((name, ctypes.c_int) for name in ("q_heads", "kv_heads")),
        ("norm_eps", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("q_norm", "k_norm")),
    ]


def _stored(x: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None) -> torch.Tensor:
    """x `[tokens, kv_heads, head_dim]` as a cache of this dtype holds it; float8 saturates."""
    if dtype != torch.float8_e4m3fn:
        return x.to(dtype)
    most = torch.finfo(dtype).max
    return (x.float() if scale is None else x.float() / scale[:, None]).clamp(-most, most).to(dtype)


def _runs_on_cpu(qk: torch.Tensor, v: torch.Tensor, turn: Turn, pages: torch.Tensor) -> bool:
    """Whether the CPU's kernel takes these: float32 throughout, a token's heads side by side."""
    return (
        not cpu_jit.refusals()
        and not qk.is_cuda
        and qk.dtype is v.dtype is pages.dtype is turn[0].dtype is torch.float32
        and qk.stride()[1:] == v.stride()[1:] == (qk.shape[2], 1)
        and pages.is_contiguous()
    )


class _Call(NamedTuple):
    """All that the launch depends on but addresses. `aligned`: on 16 bytes, pages contiguous."""

    shape: torch.Size
    kv_heads: int
    k_stride: tuple[int, ...]
    v_stride: tuple[int, ...]
    dtype: torch.dtype
    pages_dtype: torch.dtype
    device: torch.device
    aligned: bool
    rotates: bool
    settled: bool
    norm_eps: float | None


def _call_of(
    k: torch.Tensor, v: torch.Tensor, pages: torch.Tensor, options: Options, *, rotates: bool
) -> _Call:
    norms, addresses = options.norms, k.data_ptr() | v.data_ptr()
    if norms is not None:
        addresses |= norms.q.data_ptr() | norms.k.data_ptr()
    return _Call(
        k.shape,
        v.shape[1],
        k.stride(),
        v.stride(),
        k.dtype,
        pages.dtype,
        k.device,
        not addresses % 16 and pages.is_contiguous(),
        rotates,
        options.settled,
        None if norms is None else norms.eps,
    )


class _Launch:
    """A packed launch; each call says where its tensors are. For several threads."""

    def __init__(self, launch: jit.Launch, params: _Append) -> None:
        self._launch, self._params = launch, params
        self._lock = Lock()

    def __call__(
        self, tensors: Sequence[torch.Tensor], rotated: Sequence[torch.Tensor] | None, options: Options
    ) -> None:
        """`tensors` are k, v, slots and the pages of both, `rotated` what q becomes, cos and sin."""
        p = self._params
        with self._lock:
            p.k, p.v, p.slots, p.k_pages, p.v_pages = [tensor.data_ptr() for tensor in tensors]
            if rotated is not None:
                p.q, p.cos, p.sin = [tensor.data_ptr() for tensor in rotated]
            if options.norms is not None:
                p.q_norm, p.k_norm = options.norms.q.data_ptr(), options.norms.k.data_ptr()
            p.k_scale, p.v_scale = [x.data_ptr() for x in options.scales] if options.scales else (None, None)
            self._launch()


@lru_cache(kernels.PLANS)
def _plan(call: _Call) -> _Launch | None:
    """The CUDA kernel's launch, or None where torch is to run it: the kernel takes 16-byte pieces of 16-bit
    numbers, a cache alike or float8, and norms heads whose threads are all in one warp."""
    (tokens, heads, head_dim), kv_heads = call.shape, call.kv_heads
    threads = (heads + kv_heads) * (head_dim // 16)  # of a token
    pieces = call.aligned and not any(s % 8 for s in (*call.k_stride[:2], *call.v_stride[:2]))
    kinds = call.dtype in _SCALAR and call.pages_dtype in (call.dtype, torch.float8_e4m3fn)
    norms = call.norm_eps is not None
    if not (tokens and threads and pieces and kinds) or head_dim % 16 or (norms and 512 % head_dim):
        return None
    params = _Append(
        k_token=call.k_stride[0],
        k_head=call.k_stride[1],
        v_token=call.v_stride[0],
        v_head=call.v_stride[1],
        q_heads=heads - kv_heads,
        kv_heads=kv_heads,
        norm_eps=call.norm_eps or 0.0,
    )
    scalar = _SCALAR[call.dtype]
    kv_t = scalar if call.pages_dtype == call.dtype else "u8"
    defines = _defines(scalar, kv_t, head_dim, rotates=call.rotates, norms=norms, settled=call.settled)
    kernel = jit.kernel(_SOURCE, "append", defines, call.device.index)
    blocks = -(-threads // _THREADS)
    block = -(-threads // (32 * blocks)) * 32
    programmatic = kernels.programmatic(call.device)
    return _Launch(kernel.prepare((tokens, blocks), block, params, programmatic=programmatic), params)


def _defines(
    scalar: str, kv_t: str, head_dim: int, *, rotates: bool, norms: bool, settled: bool
) -> dict[str, jit.Define]:
    return {
        "scalar_t": scalar,
        "kv_t": kv_t,
        "HEAD_DIM": head_dim,
        "ROTATE": rotates,
        "NORM": norms,
        "EARLY": settled,
    }
