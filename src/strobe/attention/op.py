"""`strobe::attention`: the operator that torch.compile and torch.export see in place of a call.

Only traced code goes through it; an eager call runs the rung directly.
"""

from __future__ import annotations

from typing import Any

import torch

from strobe.attention.problem import Dense, Layout, Options, Packed, Paged
from strobe.errors import ProblemError

_LIBRARY = torch.library.Library("strobe", "DEF")
_LIBRARY.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? bias, Tensor? page_table, "
    "Tensor? seq_lens, Tensor? cu_seqlens_q, Tensor? cu_seqlens_kv, SymInt? max_q_len, "
    "SymInt? max_kv_len, SymInt[] window, bool causal, float? scale, float softcap, str kernel, "
    "bool return_lse) -> (Tensor, Tensor)"
)


def traced(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kernel: str, options: Options
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The operator's call for these arguments."""
    has = options.layout if options.layout is not None else Dense()
    if isinstance(has, Paged) and has.k_scale is not None:
        raise ProblemError("a cache with k_scale and v_scale under torch.compile; supported: outside of it")
    out, lse = torch.ops.strobe.attention(
        q,
        k,
        v,
        options.sinks,
        options.bias,
        has.page_table if isinstance(has, Paged) else None,
        has.seq_lens if isinstance(has, Paged) else None,
        None if isinstance(has, Dense) else has.cu_seqlens_q,
        has.cu_seqlens_kv if isinstance(has, Packed) else None,
        None if isinstance(has, Dense) else has.max_q_len,
        None if isinstance(has, Dense) else has.max_kv_len,
        options.window,
        options.causal,
        options.scale,
        options.softcap,
        kernel,
        options.return_lse,
    )
    return (out, lse) if options.return_lse else out


@torch.library.impl(_LIBRARY, "attention", "CompositeExplicitAutograd")
def _run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    from strobe.attention.api import run

    sinks, bias, page_table, seq_lens, cu_seqlens_q, cu_seqlens_kv, max_q_len, max_kv_len = rest[:8]
    window, causal, scale, softcap, kernel, return_lse = rest[8:]
    layout: Layout = Dense()
    if page_table is not None:
        layout = Paged(page_table, seq_lens, cu_seqlens_q, max_q_len, max_kv_len)
    elif cu_seqlens_q is not None:
        layout = Packed(cu_seqlens_q, cu_seqlens_kv, max_q_len, max_kv_len)
    options = Options(causal, tuple(window), scale, softcap, sinks, bias, layout, return_lse)
    out, lse = run(q, k, v, kernel, options)
    return out, q.new_empty(0, dtype=torch.float32) if lse is None else lse


@torch.library.register_fake("strobe::attention")
def _fake(q: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return_lse = rest[-1]
    if not return_lse:
        return out, q.new_empty(0, dtype=torch.float32)
    shape = (q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])
    return out, q.new_empty(shape, dtype=torch.float32)
