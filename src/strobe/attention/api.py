"""`attention()`: plan the call, or find the plan of one like it; run its rung."""

from __future__ import annotations

import torch
from torch.compiler import is_dynamo_compiling

from strobe.attention import plan
from strobe.attention.op import needed, traced
from strobe.attention.problem import UNLIMITED, AttentionProblem, Dense, Layout, Options


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    window: tuple[int, int] = (UNLIMITED, UNLIMITED),
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    layout: Layout | None = None,
    kernel: str = "auto",
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Exact attention: `softmax(mask(softcap(q kᵀ · scale))) v`.

    Args:
        q: `[batch, q_len, q_heads, head_dim]`, or packed `[tokens, q_heads, head_dim]`.
        k, v: `[batch, kv_len, kv_heads, head_dim]`, packed, or pages
            `[pages, page_size, kv_heads, head_dim]`, as `layout` says. `q_heads` is a multiple of
            `kv_heads`. float16, bfloat16, float32 or float64, the last dimension contiguous.
        causal: query i sees keys up to `kv_len - q_len + i` (aligned bottom-right).
        window: `(left, right)`, inclusive, counted from that same diagonal; -1 for no limit.
        scale: defaults to `head_dim ** -0.5`.
        softcap: scores become `softcap * tanh(score / softcap)`; 0 for none.
        sinks: `[q_heads]` logits, each one more term of its head's softmax sum, with no value.
        bias: added to the scores; broadcasts to `[batch, q_heads, q_len, kv_len]`; -inf hides a key.
            Dense layouts only, and for the kernels that take one.
        layout: None or `Dense()`, `Packed(...)`, `Paged(...)`.
        kernel: a rung's name, or "auto" for the fastest that fits.
        return_lse: also return the log-sum-exp of the scores (natural log, sinks included),
            float32 `[batch, q_heads, q_len]`, or `[q_heads, tokens]` where q is packed.

    Returns:
        out, of q's shape and dtype; or `(out, lse)`. A query that sees no key gives 0 and lse -inf
        (its sink, where there is one). Gradients flow: through PyTorch's own where its operators do the work,
        else recomputed by the formula, whose scores stand in memory.

    Raises:
        ProblemError: shapes, dtypes or devices that do not fit together.
        KernelRefusedError: the named kernel cannot run this; each reason is in the message.

    Source: Vaswani et al. 2017 (arXiv 1706.03762), section 3.2.1; docs/math.md.
    """
    if is_dynamo_compiling():
        options = Options(causal, window, scale, softcap, sinks, bias, layout, return_lse)
        return traced(q, k, v, kernel, options)
    if layout is not None and isinstance(layout, Dense):
        layout = None
    asked = kernel, causal, window, scale, softcap, sinks, bias, layout, return_lse
    call = plan.recent(q, k, v, layout, asked)
    if call is None or (sinks is not None and sinks.requires_grad and torch.is_grad_enabled()):
        options = Options(*asked[1:])
        if needed(q, k, v, kernel, options):
            return traced(q, k, v, kernel, options)
        out, lse = run(q, k, v, kernel, options)
    else:
        out, lse = call(q, k, v)
    return out if lse is None else (out, lse)


def run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kernel: str,
    options: Options,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`(out, lse or None)` by the chosen rung; `out` is filled where it is given: contiguous, like q."""
    call = plan.recent(q, k, v, options.layout, (kernel, *options))
    if call is not None:
        return call(q, k, v, out)
    planned = plan.of(q, k, v, kernel, options)
    if out is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = empty_lse(planned.problem, q) if options.return_lse else None
    if not planned.empty:
        with plan.current(q):
            planned.run(q, k, v, out, lse)
    return out, lse


def empty_lse(problem: AttentionProblem, q: torch.Tensor) -> torch.Tensor:
    """Room for a problem's lse, uninitialised."""
    return torch.empty(problem.lse_shape(q.shape[0]), dtype=torch.float32, device=q.device)
