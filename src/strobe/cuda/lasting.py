"""Device memory that outlives the CUDA graph that is being made around its allocation."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


def lasting(make: Callable[[], torch.Tensor], device: int) -> torch.Tensor:
    """What `make` allocates and fills, ready for the current stream, which is not being captured.

    torch's CUDA-graph trees run a call once before they capture it, on a stream of their own, and what the
    thread allocates meanwhile comes out of the graph's memory and must end with the call. So another thread
    makes it.
    """
    current, default = torch.cuda.current_stream(device), torch.cuda.default_stream(device)
    if current == default:
        return make()

    def made_apart() -> torch.Tensor:
        with torch.cuda.stream(default):
            return make()

    with ThreadPoolExecutor(1, "strobe-lasting") as thread:
        made = thread.submit(made_apart).result()
    current.wait_stream(default)
    return made
