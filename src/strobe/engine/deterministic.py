"""What `deterministic` asks for: the same bits for a request whatever else is served with it.

Bits hang on company in four ways, and each is shut off:

- A prompt's chunk shares its forward pass with others, which changes the sizes of every product. So a chunk
  runs alone, as large as the budget lets it be: its sizes are its request's own (`Scheduler`).
- Pages computed by somebody else, or computed again after a preemption, come out of other kernels. So no
  prefix is reused, and a request is only let in when it can stay to its end (`Scheduler`).
- A decode step's products add up in an order that hangs on the number of rows. So they take a rung that
  always runs the same number (`linear.batch_invariant`), or on a CPU one whose sums run over the inputs one
  by one, however many rows there are (`linear.numba_tiled`), where it takes every weight in any batch.
- A decode step's attention cuts the keys of all rows into even shares. So it takes a rung that cuts a row's
  keys by that row's length alone, or not at all.
"""

from __future__ import annotations

import torch

from strobe.cpu import jit
from strobe.linear import ladder as linear_ladder
from strobe.models.network import Model, projections

LINEAR, CPU_LINEAR = "batch_invariant", "numba_tiled"
GPU_ATTENTION = "prefill/cuda_async"
"""One block walks all keys of its query rows: slow at long contexts."""
CPU_ATTENTION, NUMBA_ATTENTION = "prefill/torch_naive", "decode/numba_paged"
"""Row by row, in any dtype; a row's keys in their order, in float32."""
_ANY_TOKENS = 1 << 20


def decode_kernels(model: Model) -> tuple[str, str]:
    """The attention and the linear kernel of steps that only decode."""
    if model.device.type == "cuda" and model.dtype in (torch.float16, torch.bfloat16):
        return GPU_ATTENTION, LINEAR
    if model.device.type != "cpu" or model.dtype != torch.float32 or jit.refusals():
        return CPU_ATTENTION, LINEAR
    tiled = linear_ladder.RUNGS[CPU_LINEAR]
    for part in (model.weights, *model.weights.layers):
        if any(tiled.refusals(each.problem(_ANY_TOKENS)) for _, each in projections(part)):
            return NUMBA_ATTENTION, LINEAR
    return NUMBA_ATTENTION, CPU_LINEAR
