"""What Triton's tuner chose, from process to process: of configurations with hooks it keeps nothing itself.

A file of JSON beside the cubins, by kernel, Triton and GPU: the choice for each kind of call. It may be
deleted at any time; one that cannot be read, or names what is no configuration any more, is as good as
absent, and the tuner measures again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from strobe.cuda import cache


def path_of(tuner: Any, gpu: str) -> Path:
    """Where a tuner's choices on GPUs of this name are kept."""
    import triton

    told = json.dumps([tuner.fn.cache_key, triton.__version__, gpu, [_told(each) for each in tuner.configs]])
    return (
        cache.folder() / f"triton-{tuner.fn.__name__}-{hashlib.sha256(told.encode()).hexdigest()[:32]}.json"
    )


def recall(tuner: Any, path: Path) -> None:
    """Give the tuner the choices of earlier processes, so that it measures none of these again."""
    known = {json.dumps(_told(each), sort_keys=True): each for each in tuner.configs}
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        found = {tuple(key): known[json.dumps(told, sort_keys=True)] for key, told in kept}
    except (OSError, ValueError, TypeError, KeyError):
        return
    tuner.cache.update(found)


def keep(tuner: Any, path: Path) -> None:
    """Keep all of the tuner's choices, whole or not at all; not where the folder cannot be written."""
    told = json.dumps([[list(key), _told(config)] for key, config in tuner.cache.items()])
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(told)
        os.replace(temporary, path)


def _told(config: Any) -> dict[str, int]:
    return {**config.kwargs, "num_warps": config.num_warps, "num_stages": config.num_stages}
