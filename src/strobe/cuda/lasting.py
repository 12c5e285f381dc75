"""Device memory that outlives the CUDA graph that is being made around its allocation."""

from __future__ import annotations

from collections.abc import Callable

import torch


def lasting(make: Callable[[], torch.Tensor], device: int) -> torch.Tensor:
    """What `make` allocates and fills, ready for the current stream, which is not being captured.

    torch's CUDA-graph trees run a call once before they capture it, on a stream whose allocations come out of
    the graph's memory and must end with the call. Those on the default stream do not.
    """
    current, default = torch.cuda.current_stream(device), torch.cuda.default_stream(device)
    if current == default:
        return make()
    with torch.cuda.stream(default):
        made = make()
    current.wait_stream(default)
    return made
