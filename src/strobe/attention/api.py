"""`attention()`: check the inputs once, choose a rung, run it."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from strobe.attention import ladder
from strobe.attention.op import traced
from strobe.attention.problem import UNLIMITED, AttentionProblem, Dense, Layout, Packed, Paged
from strobe.errors import ProblemError

_DTYPE_NAMES = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float8_e4m3fn: "float8_e4m3fn",
}


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
    mask = (options.get("causal"), *options.get("window", ()))
    key = (kernel, kinds, mask, *(options.get(name) for name in ("scale", "softcap", "bias", "return_lse")))
    if key not in layout.scratch:
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
    _check_tensors(q, k, v, sinks)
    batch, q_len, kv_len = _sizes(q, k, layout)
    if bias is not None:
        _check_bias(bias, q, (batch, q.shape[-2], q_len, kv_len))
    return AttentionProblem(
        batch=batch,
        q_len=q_len,
        kv_len=kv_len,
        q_heads=q.shape[-2],
        kv_heads=k.shape[-2],
        head_dim=q.shape[-1],
        dtype=_DTYPE_NAMES[q.dtype],
        kv_dtype=_DTYPE_NAMES[k.dtype],
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


def _check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, torch.Tensor):
            raise ProblemError(f"{name} is a {type(tensor).__name__}; supported: torch.Tensor")
        if tensor.dtype not in _DTYPE_NAMES:
            supported = ", ".join(_DTYPE_NAMES.values())
            raise ProblemError(f"{name} has dtype {tensor.dtype}; supported: {supported}")
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
    if sinks is not None and (sinks.dim() != 1 or sinks.shape[0] != q.shape[-2] or sinks.device != q.device):
        given = f"{list(sinks.shape)} on {sinks.device}"
        raise ProblemError(f"sinks is {given}; supported: [q_heads] on {q.device}")


def _check_bias(bias: torch.Tensor, q: torch.Tensor, scores: tuple[int, int, int, int]) -> None:
    fits = bias.dim() <= 4 and all(
        given in (1, wanted) for given, wanted in zip(reversed(bias.shape), reversed(scores), strict=False)
    )
    if not fits or not bias.is_floating_point() or bias.device != q.device:
        given = f"{bias.dtype} {list(bias.shape)} on {bias.device}"
        supported = f"floating point, broadcastable to {list(scores)}, on {q.device}"
        raise ProblemError(f"bias is {given}; supported: {supported}")


def _sizes(q: torch.Tensor, k: torch.Tensor, layout: Layout) -> tuple[int, int, int]:
    """(batch, longest q_len, longest kv_len) of tensors that fit the layout."""
    packed_q = isinstance(layout, Packed) or (isinstance(layout, Paged) and layout.cu_seqlens_q is not None)
    _expect_dims("q", q, 3 if packed_q else 4, layout)
    _expect_dims("k", k, 3 if isinstance(layout, Packed) else 4, layout)
    if q.shape[-1] != k.shape[-1]:
        raise ProblemError(f"head_dim of q is {q.shape[-1]}, of k {k.shape[-1]}; supported: equal")
    if isinstance(layout, Dense):
        if q.shape[0] != k.shape[0]:
            raise ProblemError(f"batch of q is {q.shape[0]}, of k {k.shape[0]}; supported: equal")
        return q.shape[0], q.shape[1], k.shape[1]
    if isinstance(layout, Packed):
        _check_index("cu_seqlens_q", layout.cu_seqlens_q, 1, q)
        _check_index("cu_seqlens_kv", layout.cu_seqlens_kv, 1, q)
        if len(layout.cu_seqlens_q) != len(layout.cu_seqlens_kv) or len(layout.cu_seqlens_q) < 1:
            given = (len(layout.cu_seqlens_q), len(layout.cu_seqlens_kv))
            raise ProblemError(
                f"cu_seqlens_q and cu_seqlens_kv have {given} entries; supported: batch + 1 in both"
            )
        return (
            len(layout.cu_seqlens_q) - 1,
            _longest(layout.max_q_len, lambda: _differences(layout.host_q)),
            _longest(layout.max_kv_len, lambda: _differences(layout.host_kv)),
        )
    _check_index("page_table", layout.page_table, 2, q)
    _check_index("seq_lens", layout.seq_lens, 1, q)
    _check_scales(layout, k)
    batch = layout.page_table.shape[0]
    if layout.seq_lens.shape[0] != batch or (not packed_q and q.shape[0] != batch):
        rows = (q.shape[0] if not packed_q else "packed", layout.seq_lens.shape[0], batch)
        raise ProblemError(f"batch of q, seq_lens and page_table is {rows}; supported: equal")
    kv_len = _longest(layout.max_kv_len, lambda: layout.host_lens)
    if kv_len > layout.page_table.shape[1] * k.shape[1]:
        room = layout.page_table.shape[1] * k.shape[1]
        table = list(layout.page_table.shape)
        raise ProblemError(f"a row has {kv_len} keys; page_table {table} holds {room}")
    if not packed_q:
        return batch, q.shape[1], kv_len
    _check_index("cu_seqlens_q", layout.cu_seqlens_q, 1, q)
    if layout.cu_seqlens_q.shape[0] != batch + 1:
        entries = layout.cu_seqlens_q.shape[0]
        raise ProblemError(f"cu_seqlens_q has {entries} entries; supported: batch + 1 = {batch + 1}")
    return batch, _longest(layout.max_q_len, lambda: _differences(layout.host_q or [0])), kv_len


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


def _longest(given: int | None, lengths: Any) -> int:
    return given if given is not None else max(lengths(), default=0)


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
