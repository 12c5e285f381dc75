"""What calls that are alike share: one description, one choice of rung, one prepared launch.

Calls are alike when their options are equal and their q, k and v agree in shape, strides, dtype and
device. The first one is checked, described and chosen for; the others find its plan by that signature.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from strobe.attention import ladder
from strobe.attention.inputs import describe
from strobe.attention.problem import AttentionProblem, Dense, Options, Packed, Paged

guards: Any = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
"""What torch's compiled code checks and allocates tensors by, without the dispatcher: no public part of torch
(2.11 to 2.13 have it), so that nothing but time may hang on it."""

Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], None]
"""Fills `out`, and `lse` where it is not None, from q, k and v: `run(q, k, v, out, lse)`."""

Call = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
"""`(out, lse or None)` of `call(q, k, v, out=None)`; `out` is filled where it is given."""

RECENT = 16
"""Plans that are tried for calls with the same options: layers of a model may take turns between shapes."""

_Again = tuple[Callable[..., bool], int | None, Call]
"""Whether tensors are alike, the GPU that must be current, the call."""

MOST = 1024
"""Plans kept of dense calls, and with each layout; then all are dropped, and made again as they are met."""

_PLANS, _WRITTEN = "plan: plans", "plan: written"
"""Where a layout's scratch has its plans, and what they were made from."""


@dataclass(eq=False)
class Plan:
    """How calls of one signature run. `empty`: there is nothing to fill. `again` is what `recent` finds."""

    problem: AttentionProblem
    rung: ladder.Rung
    run: Run
    empty: bool
    again: _Again | None = None


def recent(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Any, asked: tuple[Any, ...]
) -> Call | None:
    """What a recent call that asked for this did, if q, k and v are like its and their GPU is current.

    `asked` is `(kernel, *options)`. A look-up and one call of C++ take a third of what `of` takes to read
    shapes and strides into a key.
    """
    try:
        found = (_recent if layout is None else layout.scratch[_PLANS])[asked]
    except (KeyError, TypeError, AttributeError):  # new, without a hash, or no layout with plans
        return None
    for alike, gpu, call in found:
        if alike(q, k, v):
            return call if gpu is None or gpu == torch._C._cuda_getDevice() else None
    return None


def of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kernel: str, options: Options) -> Plan:
    """The plan of this call: found, or made and kept.

    With a packed or paged layout it is kept in the layout's scratch, so that all layers of a forward
    pass share it and it goes when the layout goes. A bias is as large as the scores: such plans are
    not kept.

    Raises:
        ProblemError, KernelRefusedError, UnknownNameError: as `api.attention`.
    """
    if not all(map(_plain, (q, k, v))) or options.bias is not None:
        return _make(q, k, v, kernel, options)
    layout = options.layout
    kept = _dense
    if isinstance(layout, Dense):
        options = options._replace(layout=None)
    elif layout is not None:
        if isinstance(layout, (Packed, Paged)) and q.device.type == "cpu":
            _follow(layout)
        kept = getattr(layout, "scratch", {}).setdefault(_PLANS, {})
    kinds = q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device
    key = kernel, options, kinds, q.stride(), k.stride(), v.stride()
    try:
        found = kept[key]
    except (KeyError, TypeError):  # new, or an argument without a hash: `describe` refuses those
        found = _make(q, k, v, kernel, options)
        if len(kept) >= MOST:
            kept.clear()
        kept[key] = found
    if kept is _dense or q.device.type == "cuda":  # on a CPU a layout is followed at each call
        _remember(found, q, k, v, kernel, options)
    return found


def _plain(x: object) -> bool:
    """Whether x is a tensor of torch's own class, none of torch.func's."""
    return type(x) is torch.Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(x)


def _remember(
    plan: Plan, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kernel: str, options: Options
) -> None:
    """Keep what `recent` finds.

    `alike` compares what torch.compile guards its code by: type, dispatch keys (which modes and torch.func
    change), dtype, device, requires_grad, shape, strides. The grad mode and function modes it does not see.
    """
    may_lose_gradients = not plan.rung.differentiable and any(x.requires_grad for x in (q, k, v))
    if may_lose_gradients or torch._C._len_torch_function_stack():
        return
    if plan.again is None or not plan.again[0](q, k, v):
        alike = _check(q, k, v)
        if alike is None:
            return
        plan.again = alike, q.get_device() if q.device.type == "cuda" else None, _call(plan, q)
    kept = _recent
    if isinstance(options.layout, (Packed, Paged)):
        kept = options.layout.scratch.setdefault(_PLANS, {})
    if len(kept) >= MOST:
        kept.clear()
    asked: tuple[Any, ...] = (kernel, *options)
    kept[asked] = (plan.again, *(each for each in kept.get(asked, ()) if each is not plan.again))[:RECENT]


def _check(*tensors: torch.Tensor) -> Callable[..., bool] | None:
    """Whether others are like these, in one call of C++; None where this torch has no such check."""
    try:
        check: Callable[..., bool] = guards.TensorGuards(
            *tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None
        ).check
    except (AttributeError, TypeError):
        return None
    return check


def _allocation(device: torch.device) -> Callable[..., torch.Tensor]:
    """Room by shape, strides and dtype: from the allocator itself in half of torch.empty_like's time."""
    direct: Callable[..., torch.Tensor] | None = getattr(guards, f"_empty_strided_{device.type}", None)
    return direct or (
        lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype, device=device)
    )


def current(q: torch.Tensor) -> AbstractContextManager[object]:
    """Within, q's GPU is the current device."""
    if q.is_cuda and q.get_device() != torch.cuda.current_device():
        return torch.cuda.device(q.get_device())
    return nullcontext()


def _call(plan: Plan, q: torch.Tensor) -> Call:
    """Calls of a plan, with room for the results where none is given."""
    problem, run, dtype = plan.problem, plan.run, q.dtype
    out_shape, lse_shape = tuple(q.shape), problem.lse_shape(q.shape[0])
    out_strides, lse_strides = contiguous_strides(out_shape), contiguous_strides(lse_shape)
    empty = _allocation(q.device)
    # not the plan itself, which refers to the call: both would wait for the collector
    is_empty, return_lse = plan.empty, problem.return_lse

    def call(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if out is None:
            out = empty(out_shape, out_strides, dtype)
        lse = empty(lse_shape, lse_strides, torch.float32) if return_lse else None
        if not is_empty:
            run(q, k, v, out, lse)
        return out, lse

    return call


_dense: dict[tuple[Any, ...], Plan] = {}
_recent: dict[tuple[Any, ...], tuple[_Again, ...]] = {}


def _follow(layout: Packed | Paged) -> None:
    """Forget what was derived from the layout's tensors if they have been written to since.

    On a CPU, where lengths and page numbers are checked. Kernels on a GPU read them there, each time.
    """
    written = layout.written
    if layout.scratch.get(_WRITTEN) != written:
        layout.scratch.clear()
        layout.scratch[_WRITTEN] = written


def _make(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kernel: str, options: Options) -> Plan:
    problem = describe(q, k, v, options)
    rung = ladder.choose(problem, kernel)
    if not q.numel():
        return Plan(problem, rung, partial(rung.run, problem), empty=True)
    return Plan(problem, rung, rung.prepare(problem, q, k, v), empty=False)


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """As torch gives them: a dimension without elements counts as one."""
    return tuple(math.prod(max(size, 1) for size in shape[i + 1 :]) for i in range(len(shape)))
