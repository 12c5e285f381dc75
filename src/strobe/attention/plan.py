"""What calls that are alike share: one description, one choice of rung, one prepared launch.

Calls are alike when their options are equal and their q, k and v agree in shape, strides, dtype and
device. The first one is checked, described and chosen for; the others find its plan by that signature.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from strobe.attention import ladder
from strobe.attention.inputs import describe
from strobe.attention.problem import AttentionProblem, Dense, Options, Packed, Paged

Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], None]
"""Fills `out`, and `lse` where it is not None, from q, k and v: `run(q, k, v, out, lse)`."""

MOST = 1024
"""Plans kept of dense calls; then all are dropped, and made again as they are met."""


@dataclass(frozen=True, eq=False)
class Plan:
    """How calls of one signature run. `empty`: there is nothing to fill."""

    problem: AttentionProblem
    rung: ladder.Rung
    run: Run
    empty: bool


def of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kernel: str, options: Options) -> Plan:
    """The plan of this call: found, or made and kept.

    With a packed or paged layout it is kept in the layout's scratch, so that all layers of a forward
    pass share it and it goes when the layout goes. A bias is as large as the scores: such plans are
    not kept.

    Raises:
        ProblemError, KernelRefusedError, UnknownNameError: as `api.attention`.
    """
    if not type(q) is type(k) is type(v) is torch.Tensor or options.bias is not None:
        return _make(q, k, v, kernel, options)
    layout = options.layout
    kept = _dense
    if isinstance(layout, Dense):
        options = options._replace(layout=None)
    elif layout is not None:
        kept = getattr(layout, "scratch", {})
        if isinstance(layout, (Packed, Paged)) and q.device.type == "cpu":
            _follow(layout)
    kinds = q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device
    key = kernel, options, kinds, q.stride(), k.stride(), v.stride()
    try:
        return kept[key]
    except (KeyError, TypeError):  # new, or an argument without a hash: `describe` refuses those
        made = _make(q, k, v, kernel, options)
    if kept is _dense and len(kept) >= MOST:
        kept.clear()
    kept[key] = made
    return made


_dense: dict[tuple[Any, ...], Plan] = {}


def _follow(layout: Packed | Paged) -> None:
    """Forget what was derived from the layout's tensors if they have been written to since.

    On a CPU, where lengths and page numbers are checked. Kernels on a GPU read them there, each time.
    """
    if isinstance(layout, Paged):
        indices = layout.page_table, layout.seq_lens, layout.cu_seqlens_q
    else:
        indices = layout.cu_seqlens_q, layout.cu_seqlens_kv, None
    versions = [_version(x) for x in indices]
    if layout.scratch.get(_VERSIONS) != versions:
        layout.scratch.clear()
        for name in ("host_q", "host_kv", "host_lens"):
            vars(layout).pop(name, None)
        layout.scratch[_VERSIONS] = versions


_VERSIONS = "plan: versions"


def _version(value: object) -> int:
    """How often a tensor has been written to; 0 for others, and under inference_mode: nobody counts."""
    return value._version if isinstance(value, torch.Tensor) and not value.is_inference() else 0


def _make(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kernel: str, options: Options) -> Plan:
    problem = describe(q, k, v, options)
    rung = ladder.choose(problem, kernel)
    return Plan(problem, rung, rung.prepare(problem, q, k, v), not q.numel())
