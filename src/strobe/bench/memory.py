"""What memory a process holds, on the host and on the GPU, and how to let go of it."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import torch


def let_go() -> None:
    """Give back to the device what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def host_bytes() -> int:
    """Memory of this process that is resident now; its peak where the system does not tell (not Linux)."""
    import resource

    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, IndexError, ValueError):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def device_bytes() -> int:
    """Bytes of tensors that live on the GPU now; 0 without one."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
