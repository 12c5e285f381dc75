"""Writing keys and values into their pages: a kernel of our own, of CUDA on a GPU and of numba on a CPU.

What the kernels do not take, torch does.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import torch

from strobe.cpu import jit as cpu_jit
from strobe.cuda import jit
from strobe.ops import rope
from strobe.ops.norm import rms_norm

Turn = tuple[torch.Tensor, torch.Tensor]

FUSES_NORMS = False
"""Whether the CUDA kernel norms the heads itself. torch does until that has been timed."""
READS_EARLY = False
"""Whether the CUDA kernel starts beside the kernel just ahead of it and reads slots, cos and sin, which were
complete when that one started, before it has ended. Not yet timed."""

_SOURCE = Path(__file__).with_suffix(".cu")
_SCALAR = {torch.float16: "f16", torch.bfloat16: "bf16"}
_THREADS = 256


@dataclass(frozen=True, eq=False)
class HeadNorms:
    """RMSNorm of each query's and key's head, before it is rotated: weights `[head_dim]`, and epsilon."""

    q: torch.Tensor
    k: torch.Tensor
    eps: float


def append(
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    slots: torch.Tensor,
    scales: Turn | None = None,
) -> None:
    """Store each token's key and value of one layer, in place.

    k and v `[tokens, kv_heads, head_dim]`; k_pages and v_pages `[pages, page_size, kv_heads, head_dim]`,
    contiguous; slots int64 `[tokens]`, `page * page_size + offset`, each within the cache. `scales` are
    (k_scale, v_scale) of a float8 cache, float32 `[kv_heads]`: what is stored is divided by them.
    """
    if _runs(k, v, k_pages):
        _launch_append(k, v, None, k_pages, v_pages, slots, _How(scales=scales))
        return
    if k.dtype == v.dtype == k_pages.dtype:
        k_pages.flatten(0, 1).index_copy_(0, slots, k)
        v_pages.flatten(0, 1).index_copy_(0, slots, v)
        return
    for x, pages, scale in zip((k, v), (k_pages, v_pages), scales or (None, None), strict=True):
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
    scales: Turn | None = None,
    norms: HeadNorms | None = None,
) -> torch.Tensor:
    """Rotate queries and keys by their positions, store the keys and the values, and return the queries.

    qk `[tokens, q_heads + kv_heads, head_dim]`; `turn` is `rope.angles`' cos and sin; `norms` come before
    that; the rest as `append`. Returns `[tokens, q_heads, head_dim]`. On a GPU this is one launch, on a CPU
    with numba one loop.
    """
    q_heads = qk.shape[1] - v.shape[1]
    if norms is not None and not (FUSES_NORMS and _runs(qk, v, k_pages) and _norms_run(qk, norms)):
        q, k = qk.split_with_sizes((q_heads, v.shape[1]), 1)
        qk, norms = torch.cat((rms_norm(q, norms.q, norms.eps), rms_norm(k, norms.k, norms.eps)), 1), None
    if _runs(qk, v, k_pages):
        q = qk.new_empty((qk.shape[0], q_heads, qk.shape[2]))
        _launch_append(qk, v, q, k_pages, v_pages, slots, _How(turn, norms, scales))
        return q
    if _runs_on_cpu(qk, v, turn, k_pages):
        (tokens, _, head_dim), kv_heads = qk.shape, v.shape[1]
        q = qk.new_empty((tokens, q_heads, head_dim))
        given = (qk, v, *turn, slots, k_pages, v_pages, q)
        cpu_jit.kernels("strobe.ops.cache_kernel").append_rotated(
            *[x.data_ptr() for x in given], tokens, q_heads, kv_heads, head_dim, qk.stride(0), v.stride(0)
        )
        return q
    q, k = rope.rotate(qk, *turn).split_with_sizes((q_heads, v.shape[1]), 1)
    append(k, v, k_pages, v_pages, slots, scales)
    return q


def sources(arch: str) -> list[jit.Source]:
    floats8 = int("".join(digit for digit in arch if digit.isdigit())) >= 89
    return [
        jit.Source(_SOURCE, _defines(scalar, kv, 128, rotates=rotates, norms=norms))
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
        *((name, ctypes.c_int) for name in ("tokens", "q_heads", "kv_heads")),
        ("norm_eps", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("q_norm", "k_norm")),
    ]


@dataclass(frozen=True, eq=False)
class _How:
    """What is done to queries, keys and values on their way."""

    turn: Turn | None = None
    norms: HeadNorms | None = None
    scales: Turn | None = None


def _stored(x: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None) -> torch.Tensor:
    """x `[tokens, kv_heads, head_dim]` as a cache of this dtype holds it; float8 saturates."""
    if dtype != torch.float8_e4m3fn:
        return x.to(dtype)
    most = torch.finfo(dtype).max
    return (x.float() if scale is None else x.float() / scale[:, None]).clamp(-most, most).to(dtype)


def _runs(k: torch.Tensor, v: torch.Tensor, pages: torch.Tensor) -> bool:
    """Whether the CUDA kernel takes these: 16-byte pieces of 16-bit numbers, a cache alike or float8."""
    if not k.is_cuda:
        return False
    pieces = all(x.data_ptr() % 16 == 0 and not any(s % 8 for s in x.stride()[:2]) for x in (k, v))
    kinds = k.dtype in _SCALAR and pages.dtype in (k.dtype, torch.float8_e4m3fn)
    return kinds and pieces and k.shape[-1] % 16 == 0 and pages.is_contiguous()


def _runs_on_cpu(qk: torch.Tensor, v: torch.Tensor, turn: Turn, pages: torch.Tensor) -> bool:
    """Whether the CPU's kernel takes these: float32 throughout, a token's heads side by side."""
    return (
        not cpu_jit.refusals()
        and not qk.is_cuda
        and qk.dtype is v.dtype is pages.dtype is turn[0].dtype is torch.float32
        and qk.stride()[1:] == v.stride()[1:] == (qk.shape[2], 1)
        and pages.is_contiguous()
    )


def _norms_run(qk: torch.Tensor, norms: HeadNorms) -> bool:
    """Whether the CUDA kernel norms these heads: those whose threads are all in one warp."""
    weights = (norms.q, norms.k)
    return 512 % qk.shape[2] == 0 and all(w.dtype == qk.dtype and w.data_ptr() % 16 == 0 for w in weights)


def _launch_append(
    k: torch.Tensor,
    v: torch.Tensor,
    q: torch.Tensor | None,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    slots: torch.Tensor,
    how: _How,
) -> None:
    (tokens, heads, head_dim), kv_heads = k.shape, v.shape[1]
    params = _Append(
        k=k.data_ptr(),
        v=v.data_ptr(),
        k_pages=k_pages.data_ptr(),
        v_pages=v_pages.data_ptr(),
        slots=slots.data_ptr(),
        k_token=k.stride(0),
        k_head=k.stride(1),
        v_token=v.stride(0),
        v_head=v.stride(1),
        tokens=tokens,
        q_heads=heads - kv_heads,
        kv_heads=kv_heads,
    )
    if q is not None and how.turn is not None:
        params.q, params.cos, params.sin = (x.data_ptr() for x in (q, *how.turn))
    if how.norms is not None:
        params.q_norm, params.k_norm = how.norms.q.data_ptr(), how.norms.k.data_ptr()
        params.norm_eps = how.norms.eps
    if how.scales is not None:
        params.k_scale, params.v_scale = (scale.data_ptr() for scale in how.scales)
    scalar = _SCALAR[k.dtype]
    kv_t = scalar if k_pages.dtype == k.dtype else "u8"
    defines = _defines(scalar, kv_t, head_dim, rotates=how.turn is not None, norms=how.norms is not None)
    threads = tokens * (heads + kv_heads) * (head_dim // 16)
    if threads:
        kernel = jit.kernel(_SOURCE, "append", defines, k.get_device())
        if READS_EARLY:
            kernel.prefer_shared_memory()
        kernel(-(-threads // _THREADS), _THREADS, params, programmatic=_programmatic(k))


def _defines(scalar: str, kv_t: str, head_dim: int, *, rotates: bool, norms: bool) -> dict[str, jit.Define]:
    return {
        "scalar_t": scalar,
        "kv_t": kv_t,
        "HEAD_DIM": head_dim,
        "ROTATE": rotates,
        "NORM": norms,
        "EARLY": READS_EARLY,
    }


def _programmatic(tensor: torch.Tensor) -> bool:
    """Programmatic launch came with Hopper."""
    return torch.cuda.get_device_capability(tensor.device)[0] >= 9
