"""Writing keys and values into their pages: torch's on a CPU, a CUDA kernel of our own on a GPU."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from strobe.cuda import jit
from strobe.ops import rope

Turn = tuple[torch.Tensor, torch.Tensor]

_SOURCE = Path(__file__).with_suffix(".cu")
_SCALAR = {torch.float16: "f16", torch.bfloat16: "bf16"}
_THREADS = 256


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
    if k.is_cuda and _runs(k, v, k_pages):
        _launch_append(k, v, None, None, k_pages, v_pages, slots, scales)
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
) -> torch.Tensor:
    """Rotate queries and keys by their positions, store the keys and the values, and return the queries.

    qk `[tokens, q_heads + kv_heads, head_dim]`; `turn` is `rope.angles`' cos and sin; the rest as
    `append`. Returns `[tokens, q_heads, head_dim]`. On a GPU this is one launch.
    """
    q_heads = qk.shape[1] - v.shape[1]
    if qk.is_cuda and _runs(qk, v, k_pages):
        q = qk.new_empty((qk.shape[0], q_heads, qk.shape[2]))
        _launch_append(qk, v, q, turn, k_pages, v_pages, slots, scales)
        return q
    q, k = rope.rotate(qk, *turn).split_with_sizes((q_heads, v.shape[1]), 1)
    append(k, v, k_pages, v_pages, slots, scales)
    return q


def sources(arch: str) -> list[jit.Source]:
    floats8 = int("".join(digit for digit in arch if digit.isdigit())) >= 89
    return [
        jit.Source(_SOURCE, {"scalar_t": scalar, "kv_t": kv, "HEAD_DIM": 128, "ROTATE": rotate})
        for scalar in _SCALAR.values()
        for kv in ((scalar, "u8") if floats8 else (scalar,))
        for rotate in (False, True)
    ]


class _Append(ctypes.Structure):
    """`Append` of cache.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("k", "v", "q", "k_pages", "v_pages", "cos", "sin", "slots")),
        *((name, ctypes.c_void_p) for name in ("k_scale", "v_scale")),
        *((name, ctypes.c_int64) for name in ("k_token", "k_head", "v_token", "v_head")),
        *((name, ctypes.c_int) for name in ("tokens", "q_heads", "kv_heads")),
    ]


def _stored(x: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None) -> torch.Tensor:
    """x `[tokens, kv_heads, head_dim]` as a cache of this dtype holds it; float8 saturates."""
    if dtype != torch.float8_e4m3fn:
        return x.to(dtype)
    most = torch.finfo(dtype).max
    return (x.float() if scale is None else x.float() / scale[:, None]).clamp(-most, most).to(dtype)


def _runs(k: torch.Tensor, v: torch.Tensor, pages: torch.Tensor) -> bool:
    """Whether the kernel takes a GPU's tensors: 16-byte pieces of 16-bit numbers, a cache alike or float8."""
    pieces = all(x.data_ptr() % 16 == 0 and not any(s % 8 for s in x.stride()[:2]) for x in (k, v))
    kinds = k.dtype in _SCALAR and pages.dtype in (k.dtype, torch.float8_e4m3fn)
    return kinds and pieces and k.shape[-1] % 16 == 0 and pages.is_contiguous()


def _launch_append(
    k: torch.Tensor,
    v: torch.Tensor,
    q: torch.Tensor | None,
    turn: Turn | None,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    slots: torch.Tensor,
    scales: Turn | None,
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
    if q is not None and turn is not None:
        params.q, params.cos, params.sin = (x.data_ptr() for x in (q, *turn))
    if scales is not None:
        params.k_scale, params.v_scale = (scale.data_ptr() for scale in scales)
    scalar = _SCALAR[k.dtype]
    kv_t = scalar if k_pages.dtype == k.dtype else "u8"
    defines: dict[str, jit.Define] = {
        "scalar_t": scalar,
        "kv_t": kv_t,
        "HEAD_DIM": head_dim,
        "ROTATE": turn is not None,
    }
    threads = tokens * (heads + kv_heads) * (head_dim // 16)
    if threads:
        kernel = jit.kernel(_SOURCE, "append", defines, k.get_device())
        kernel(-(-threads // _THREADS), _THREADS, params, programmatic=_programmatic(k))


def _programmatic(tensor: torch.Tensor) -> bool:
    """Programmatic launch came with Hopper."""
    return torch.cuda.get_device_capability(tensor.device)[0] >= 9
