"""FlashAttention's functions over strobe: `from strobe.integrations.flash_attn import flash_attn_func`.

Signatures, layouts and semantics are those of the flash_attn package (2.x): causal is aligned bottom-right,
windows are inclusive, a query that sees nothing gives 0 (and lse -inf, where flash_attn has inf). It is made
for inference: gradients are those of `strobe.attention`, by the formula. What strobe does not have (dropout,
alibi slopes, attention probabilities) is refused by name. Queries, keys and values whose last dimension is
not contiguous are copied; caches are not. Runs on a CPU as well.
"""

from __future__ import annotations

from numbers import Integral
from typing import Any, cast

import torch

from strobe.attention.api import attention
from strobe.attention.problem import Packed, Paged
from strobe.errors import ProblemError
from strobe.integrations import kvcache

Tensor = torch.Tensor
NO_WINDOW = (-1, -1)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = NO_WINDOW,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """q `[batch, q_len, q_heads, head_dim]`, k and v `[batch, kv_len, kv_heads, head_dim]` → out like q.

    With `return_attn_probs`: `(out, lse [batch, q_heads, q_len], None)`; the probabilities, which
    flash_attn gives for tests of its dropout only, are not made. strobe is always deterministic.
    """
    _refuse(dropout_p, alibi_slopes)
    out = attention(
        *map(_contiguous, (q, k, v)),
        causal=bool(causal),
        window=(window_size[0], window_size[1]),
        scale=softmax_scale,
        softcap=softcap,
        return_lse=return_attn_probs,
    )
    return (*out, None) if return_attn_probs else out


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = NO_WINDOW,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """Rows laid end to end: q `[tokens, q_heads, head_dim]`, k and v `[kv_tokens, kv_heads, head_dim]`.

    `cu_seqlens_*` int32 `[batch + 1]`. With `block_table` int32 `[batch, max_pages]`, k and v are
    pages `[pages, page_size, kv_heads, head_dim]`. lse is `[q_heads, tokens]`.
    """
    _refuse(dropout_p, alibi_slopes)
    layout: Packed | Paged
    if block_table is not None:
        _check_index("cu_seqlens_k", cu_seqlens_k, [len(block_table) + 1], q.device, torch.int32)
        seq_lens = (cu_seqlens_k[1:] - cu_seqlens_k[:-1]).to(torch.int32)
        layout = Paged(block_table, seq_lens, cu_seqlens_q, int(max_seqlen_q), int(max_seqlen_k))
    else:
        layout = Packed(cu_seqlens_q, cu_seqlens_k, int(max_seqlen_q), int(max_seqlen_k))
    out = attention(
        *map(_contiguous, (q, k, v)),
        causal=bool(causal),
        window=(window_size[0], window_size[1]),
        scale=softmax_scale,
        softcap=softcap,
        layout=layout,
        return_lse=return_attn_probs,
    )
    return (*out, None) if return_attn_probs else out


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = NO_WINDOW,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Attention against a cache, after appending `k` and `v` to it in place where they are given.

    q `[batch, q_len, q_heads, head_dim]`; k_cache and v_cache `[batch_cache, kv_max, kv_heads,
    head_dim]`, or pages `[pages, page_size, kv_heads, head_dim]` with `block_table` int32
    `[batch, max_pages]`; k and v `[batch, new_len, kv_heads, head_dim]`; cache_seqlens int32
    `[batch]` counts the keys before the new ones (None: the whole cache). rotary_cos and rotary_sin
    `[positions, rotary_dim / 2]` rotate k at its positions, and q at the same where causal or
    windowed, else all of q at cache_seqlens. `num_splits` is strobe's own choice and ignored.

    Raises ProblemError for what does not fit together; lengths, page and position numbers are checked on
    a CPU, and on a GPU or under torch.compile the caller's word.
    """
    _refuse(0.0, alibi_slopes)
    if q.dim() != 4 or k_cache.dim() != 4 or v_cache.shape != k_cache.shape:
        given = f"q is {list(q.shape)}, k_cache {list(k_cache.shape)}, v_cache {list(v_cache.shape)}"
        raise ProblemError(f"{given}; supported: 4 dimensions, and equal caches")
    if cache_leftpad is not None:
        raise ProblemError("cache_leftpad is given; supported: None", hint="shift the page table instead")
    if block_table is not None and cache_batch_idx is not None:
        raise ProblemError("cache_batch_idx with block_table; supported: one of the two")
    _check_new(q, k_cache, k, v, rotary_cos, rotary_sin)
    if k is not None and cache_seqlens is None:
        raise ProblemError("k and v without cache_seqlens; supported: with the number of keys before them")
    batch, q_len = q.shape[:2]
    if block_table is None:
        if cache_batch_idx is not None:
            _check_index("cache_batch_idx", cache_batch_idx, [batch], q.device, torch.int32, torch.int64)
        k_cache, v_cache, table = kvcache.pages(k_cache, v_cache, batch, cache_batch_idx)
    else:
        table = block_table
        _check_index("block_table", table, [batch, "pages"], q.device, torch.int32)
    page_size = k_cache.shape[1]
    room = table.shape[1] * page_size
    before = _lengths(cache_seqlens, batch, room, q.device)
    new_len = 0
    if k is not None and v is not None:
        new_len = k.shape[1]
        if q.device.type == "cpu" and not torch.compiler.is_compiling():
            _check_room(before, new_len, table, k_cache)
            _check_positions(before, max(new_len, q_len), rotary_cos)
        if rotary_cos is not None and rotary_sin is not None:
            k = _rotate(k, rotary_cos, rotary_sin, before, rotary_interleaved, step=1)
            moves = causal or tuple(window_size) != NO_WINDOW
            q = _rotate(q, rotary_cos, rotary_sin, before, rotary_interleaved, step=1 if moves else 0)
        at = before[:, None].long()
        if new_len != 1:
            at = at + torch.arange(new_len, device=q.device)
        slots = table.gather(1, at // page_size).long(), at % page_size
        k_cache[slots] = k.to(k_cache.dtype)
        v_cache[slots] = v.to(v_cache.dtype)
    if any(x.requires_grad for x in (q, k_cache, v_cache)):  # whose gradients read the lengths again
        layout = Paged(table, before + new_len, max_q_len=q_len, max_kv_len=room)
    else:
        layout = kvcache.layout(table, before, new_len, q_len, room)
    return attention(
        _contiguous(q),
        k_cache,
        v_cache,
        causal=bool(causal),
        window=(window_size[0], window_size[1]),
        scale=softmax_scale,
        softcap=softcap,
        layout=layout,
        return_lse=return_softmax_lse,
    )


def _check_new(
    q: Tensor,
    k_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
) -> None:
    """Raise ProblemError unless new keys and values, and the tables that turn them, fit q and the cache."""
    if (k is None) != (v is None) or (rotary_cos is None) != (rotary_sin is None):
        raise ProblemError("one of k and v, or of rotary_cos and rotary_sin; supported: both or neither")
    if k is None or v is None:
        if rotary_cos is not None:
            raise ProblemError("rotary_cos and rotary_sin without k and v; supported: with new keys")
        return
    if k.dim() != 4 or k.shape != v.shape or (len(k), *k.shape[2:]) != (len(q), *k_cache.shape[2:]):
        supported = f"[{len(q)}, new_len, {', '.join(map(str, k_cache.shape[2:]))}] both"
        raise ProblemError(f"k is {list(k.shape)}, v {list(v.shape)}; supported: {supported}")
    if rotary_cos is None or rotary_sin is None:
        return
    if rotary_cos.shape != rotary_sin.shape or rotary_cos.dim() != 2 or 2 * rotary_cos.shape[1] > q.shape[-1]:
        given = f"rotary_cos is {list(rotary_cos.shape)}, rotary_sin {list(rotary_sin.shape)}"
        raise ProblemError(f"{given}; supported: [positions, up to {q.shape[-1] // 2}] both")


def _lengths(cache_seqlens: int | Tensor | None, batch: int, room: int, device: torch.device) -> Tensor:
    """int32 `[batch]`: each row's keys before the new ones."""
    if cache_seqlens is None or isinstance(cache_seqlens, Integral):
        length = room if cache_seqlens is None else cache_seqlens
        return torch.full((batch,), length, dtype=torch.int32, device=device)
    _check_index("cache_seqlens", cache_seqlens, [batch], device, torch.int32, torch.int64)
    return cast(Tensor, cache_seqlens).to(torch.int32)


def _check_index(
    name: str, index: Any, shape: list[int | str], device: torch.device, *dtypes: torch.dtype
) -> None:
    """Raise ProblemError unless `index` is such a tensor on the device; the size "pages" is any."""
    given = type(index).__name__
    if isinstance(index, torch.Tensor):
        given = f"{index.dtype} {list(index.shape)} on {index.device}"
        sizes_fit = index.dim() == len(shape) and all(
            want in (size, "pages") for want, size in zip(shape, index.shape, strict=True)
        )
        if sizes_fit and index.dtype in dtypes and index.device == device:
            return
    wanted = f"{' or '.join(map(str, dtypes))} [{', '.join(map(str, shape))}] on {device}"
    raise ProblemError(f"{name} is {given}; supported: {wanted}")


def _contiguous(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy whose last dimension is contiguous, as flash_attn makes one."""
    return x if not x.dim() or x.stride(-1) == 1 else x.contiguous()


def _check_room(before: Tensor, new_len: int, table: Tensor, k_cache: Tensor) -> None:
    """Raise ProblemError where new keys would be written outside of their rows' pages."""
    pages, page_size = k_cache.shape[:2]
    room = table.shape[1] * page_size
    if before.numel() and (int(before.min()) < 0 or int(before.max()) + new_len > room):
        raise ProblemError(
            f"cache_seqlens is {before.tolist()!r:.80} and {new_len} keys are new; a row has room for {room}"
        )
    ends = (before + new_len)[:, None]
    wrong = table[(torch.arange(table.shape[1]) * page_size < ends) & ((table < 0) | (table >= pages))]
    if wrong.numel():
        raise ProblemError(f"block_table holds page {int(wrong[0])}; the cache has {pages} pages, from 0")


def _check_positions(before: Tensor, tokens: int, cos: Tensor | None) -> None:
    """Raise ProblemError where a token stands past the last position of the rotary tables."""
    last = int(before.max()) + tokens - 1 if cos is not None and before.numel() else -1
    if cos is not None and last >= len(cos):
        raise ProblemError(f"rotary_cos and rotary_sin have {len(cos)} positions; the last is {last}")


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, start: Tensor, interleaved: bool, step: int) -> Tensor:
    """x `[batch, tokens, heads, head_dim]`, rotary_dim of it turned; token i at start + i * step."""
    positions = start[:, None].long() + step * torch.arange(x.shape[1], device=x.device)
    cos, sin = (table[positions].unsqueeze(2).float() for table in (cos, sin))
    rotary_dim = 2 * cos.shape[-1]
    turned, rest = x[..., :rotary_dim].float(), x[..., rotary_dim:]
    if interleaved:
        first, second = turned[..., ::2], turned[..., 1::2]
        turned = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(-2)
    else:
        first, second = turned.chunk(2, dim=-1)
        turned = torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
    return torch.cat([turned.to(x.dtype), rest], dim=-1)


def _refuse(dropout_p: float, alibi_slopes: Tensor | None) -> None:
    if dropout_p:
        raise ProblemError(f"dropout_p is {dropout_p}; supported: 0.0", hint="strobe runs inference")
    if alibi_slopes is not None:
        raise ProblemError("alibi_slopes is given; supported: None", hint="pass bias= to strobe.attention")
