"""`strobe::attention`: the operator that torch's dispatcher, and so torch.compile and torch.export, see.

Its gradients are recomputed by the rung that keeps to the formula, whichever ran. An eager call runs the
rung directly unless it needs the dispatcher.
"""

from __future__ import annotations

from typing import Any

import torch

from strobe.attention import dense, ladder
from strobe.attention.inputs import describe
from strobe.attention.problem import Dense, Layout, Options, Packed, Paged
from strobe.errors import ProblemError

_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? bias, Tensor? page_table, "
    "Tensor? seq_lens, Tensor? cu_seqlens_q, Tensor? cu_seqlens_kv, SymInt? max_q_len, "
    "SymInt? max_kv_len, SymInt[] window, bool causal, float? scale, float softcap, str kernel, "
    "bool return_lse"
)
_DIFFERENTIABLE = 5
"""q, k, v, sinks and bias stand first."""
_LIBRARY = torch.library.Library("strobe", "DEF")
_LIBRARY.define(f"attention({_ARGUMENTS}) -> (Tensor, Tensor)")
_LIBRARY.define(f"attention_backward(Tensor out_grad, Tensor lse_grad, {_ARGUMENTS}) -> Tensor[]")


def needed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kernel: str, options: Options) -> bool:
    """Whether an eager call must go through the operator.

    Those of fake tensors and of wrapper subclasses, or under a dispatch mode, do. Those that want gradients,
    or are under torch.func, do unless PyTorch's own operators do the work.
    """
    tensors = [x for x in (q, k, v, options.sinks, options.bias) if isinstance(x, torch.Tensor)]
    python = torch._C.DispatchKey.Python
    if torch._C._dispatch_tls_is_dispatch_key_included(python):
        return True
    if any(torch._C._dispatch_keys(x).has(python) for x in tensors):
        return True
    transformed = any(map(torch._C._functorch.is_functorch_wrapped_tensor, tensors))
    wants_gradients = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    if not (transformed or wants_gradients):
        return False
    return not ladder.choose(describe(q, k, v, options), kernel).differentiable


def traced(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kernel: str, options: Options
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The operator's call for these arguments."""
    has = options.layout if options.layout is not None else Dense()
    if isinstance(has, Paged) and has.k_scale is not None:
        raise ProblemError(
            "a cache with k_scale and v_scale, traced or with gradients; supported: eager, without"
        )
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
    if isinstance(layout, Dense):
        dense.captured.clear()  # torch.compile's graphs hold no memory but their own
    else:
        layout.scratch.clear()  # its plans name the layout: both would wait for the collector
    return out, q.new_empty(0, dtype=torch.float32) if lse is None else lse


@torch.library.register_fake("strobe::attention")
def _fake(q: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return_lse = rest[-1]
    if not return_lse:
        return out, q.new_empty(0, dtype=torch.float32)
    shape = (q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])
    return out, q.new_empty(shape, dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.given = [None if isinstance(x, torch.Tensor) else x for x in inputs]
    ctx.save_for_backward(*(x if isinstance(x, torch.Tensor) else None for x in inputs))


def _gradients(ctx: Any, out_grad: torch.Tensor, lse_grad: torch.Tensor) -> tuple[Any, ...]:
    inputs = [
        given if kept is None else kept for given, kept in zip(ctx.given, ctx.saved_tensors, strict=True)
    ]
    made = iter(torch.ops.strobe.attention_backward(out_grad, lse_grad, *inputs))
    firsts = [None if x is None else next(made) for x in inputs[:_DIFFERENTIABLE]]
    return (*firsts, *[None] * (len(inputs) - _DIFFERENTIABLE))


torch.library.register_autograd("strobe::attention", _gradients, setup_context=_keep)


@torch.library.impl(_LIBRARY, "attention_backward", "CompositeExplicitAutograd")
def _run_backward(out_grad: torch.Tensor, lse_grad: torch.Tensor, *inputs: Any) -> list[torch.Tensor]:
    with torch.enable_grad():
        firsts: list[Any] = [
            None if x is None else x.detach().requires_grad_() for x in inputs[:_DIFFERENTIABLE]
        ]
        *others, _, return_lse = inputs[_DIFFERENTIABLE:]
        outputs = _run(*firsts, *others, "prefill/torch_naive", return_lse)
    grads = (out_grad, lse_grad) if return_lse else (out_grad,)
    wanted = [x for x in firsts if x is not None]
    return list(torch.autograd.grad(outputs[: len(grads)], wanted, grads, materialize_grads=True))


@torch.library.register_fake("strobe::attention_backward")
def _fake_backward(out_grad: torch.Tensor, lse_grad: torch.Tensor, *inputs: Any) -> list[torch.Tensor]:
    return [torch.empty_like(x) for x in inputs[:_DIFFERENTIABLE] if x is not None]
