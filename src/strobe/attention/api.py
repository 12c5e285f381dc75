"""`attention()`: check the inputs once, choose a rung, run it."""

from __future__ import annotations

from typing import Any

import torch

from strobe.attention import inputs, ladder
from strobe.attention.op import traced
from strobe.attention.problem import UNLIMITED, AttentionProblem, Dense, Layout, Paged


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
        (its sink, where there is one). Forward only: gradients flow through the PyTorch rungs alone.

    Raises:
        ProblemError: shapes, dtypes or devices that do not fit together.
        KernelRefusedError: the named kernel cannot run this; each reason is in the message.

    Source: Vaswani et al. 2017 (arXiv 1706.03762), section 3.2.1; docs/math.md.
    """
    options: dict[str, Any] = {
        "causal": causal,
        "window": window,
        "scale": scale,
        "softcap": softcap,
        "sinks": sinks,
        "bias": bias,
    }
    if torch.compiler.is_compiling():
        return traced(q, k, v, layout, return_lse, kernel=kernel, **options)
    out, lse = run(q, k, v, kernel, layout=layout, return_lse=return_lse, **options)
    return out if lse is None else (out, lse)


def run(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kernel: str, **options: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`(out, lse or None)` by the chosen rung; `options` as in `describe`."""
    problem, rung = _plan(q, k, v, kernel, options)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = empty_lse(problem, q) if problem.return_lse else None
    if out.numel():
        rung.run(problem, q, k, v, out, lse)
    return out, lse


def _plan(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kernel: str, options: dict[str, Any]
) -> tuple[AttentionProblem, ladder.Rung]:
    """The problem, and the rung that runs it.

    The layers of a forward pass share a paged layout and differ in their numbers alone: what was
    checked and chosen for one is kept in the layout's scratch for the others.
    """
    layout = options.get("layout")
    tensors = type(q) is type(k) is type(v) is torch.Tensor
    scaled = isinstance(layout, Paged) and layout.k_scale is not None
    if not tensors or not isinstance(layout, Paged) or scaled or options.get("sinks") is not None:
        problem = describe(q, k, v, **options)
        return problem, ladder.choose(problem, kernel)
    kinds = tuple((x.shape, x.dtype, x.device, x.stride()[-1:]) for x in (q, k, v))
    names = ("causal", "window", "scale", "softcap", "bias", "return_lse")
    key = (kernel, kinds, *(options.get(name) for name in names))
    try:
        return layout.scratch[key]
    except (KeyError, TypeError):  # new, or an argument without a hash: `describe` refuses those
        problem = describe(q, k, v, **options)
    layout.scratch[key] = problem, ladder.choose(problem, kernel)
    return layout.scratch[key]


def empty_lse(problem: AttentionProblem, q: torch.Tensor) -> torch.Tensor:
    """Room for a problem's lse, uninitialised."""
    shape = (
        (problem.q_heads, q.shape[0]) if problem.packed_q else (problem.batch, problem.q_heads, problem.q_len)
    )
    return torch.empty(shape, dtype=torch.float32, device=q.device)


def describe(
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
    return_lse: bool = False,
) -> AttentionProblem:
    """The AttentionProblem of these tensors. Arguments and errors as in `attention`."""
    layout = layout if layout is not None else Dense()
    inputs.check_tensors(q, k, v, sinks)
    batch, q_len, kv_len = inputs.sizes(q, k, layout)
    if bias is not None:
        inputs.check_bias(bias, q, (batch, q.shape[-2], q_len, kv_len))
    return AttentionProblem(
        batch=batch,
        q_len=q_len,
        kv_len=kv_len,
        q_heads=q.shape[-2],
        kv_heads=k.shape[-2],
        head_dim=q.shape[-1],
        dtype=inputs.DTYPE_NAMES[q.dtype],
        kv_dtype=inputs.DTYPE_NAMES[k.dtype],
        causal=causal,
        window=window,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        bias=bias,
        layout=layout,
        page_size=k.shape[1] if isinstance(layout, Paged) else 0,
        device=q.device.type,
        arch=_arch(q.device),
        return_lse=return_lse,
    )


_ARCH: dict[int, int] = {}


def _arch(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    index = device.index if device.index is not None else torch.cuda.current_device()
    if index not in _ARCH:
        major, minor = torch.cuda.get_device_capability(index)
        _ARCH[index] = 10 * major + minor
    return _ARCH[index]
