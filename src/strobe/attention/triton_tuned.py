"""The fastest of a Triton kernel's configurations: timed at the first problem of a kind, and kept.

What was chosen stands in a file of JSON beside the cubins. It may be deleted at any time; one that cannot be
read, or names what is no configuration any more, is as good as absent, and they are timed again.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from strobe.attention.triton_launch import Kernel
from strobe.cuda import cache
from strobe.device import gpu

_ROUNDS, _CALLS = 5, 4


class Config(NamedTuple):
    """Tiles of queries and of keys, warps, and stages of the pipeline."""

    q_tile: int
    k_tile: int
    warps: int
    stages: int


_chosen: dict[tuple[Kernel, str, int], Config] = {}


def choose(
    kernel: Kernel,
    kind: str,
    configs: Sequence[Config],
    prepare: Callable[[Config], Callable[[], None]],
    device: int,
) -> Config:
    """The fastest of `configs` for problems of this kind on a device, of which `prepare` makes calls.

    The first, and nothing kept, while a CUDA graph is captured: nothing can be timed then.
    """
    key = (kernel, kind, device)
    found = _chosen.get(key)
    if found is None:
        path = path_of(kernel, gpu(device).name)
        kept = recall(path).get(kind)
        if kept and kept in configs:
            found = kept
        elif torch.cuda.is_current_stream_capturing():
            return configs[0]
        else:
            with ThreadPoolExecutor(len(configs)) as pool:  # compiling takes 0.5 to 1 s each
                calls = list(pool.map(prepare, configs))
            times = measure(calls)
            found = configs[times.index(min(times))]
            keep(path, recall(path) | {kind: found})
        _chosen[key] = found
    return found


def measure(calls: Sequence[Callable[[], None]]) -> list[float]:
    """Milliseconds that the shortest of some rounds took of each, in turns."""
    least = [float("inf")] * len(calls)
    for call in calls:
        call()
    for _ in range(_ROUNDS):
        for index, call in enumerate(calls):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(_CALLS):
                call()
            end.record()
            end.synchronize()
            least[index] = min(least[index], begin.elapsed_time(end) / _CALLS)
    return least


def path_of(kernel: Kernel, name: str) -> Path:
    """Where choices on GPUs of this name are kept."""
    return cache.folder() / f"triton-{kernel.entry}-{kernel.digest(name)[:32]}.json"


def recall(path: Path) -> dict[str, Config]:
    """What earlier processes chose, by kind."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return {str(kind): Config(*map(int, numbers)) for kind, numbers in kept.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def keep(path: Path, choices: dict[str, Config]) -> None:
    """Keep choices, whole or not at all; not where the folder cannot be written."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(choices, file)
        os.replace(temporary, path)
