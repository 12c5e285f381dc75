"""What numba keeps of compiled kernels: folders of ours under STROBE_CACHE_DIR/numba, its files in them."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path

from strobe import settings

_CODE, _INDEX = ".nbc", ".nbi"


@dataclass(frozen=True)
class Entry:
    """One kernel's machine code. `age_s` counts from its last write."""

    path: Path
    name: str
    size: int
    age_s: float


def folder() -> Path:
    """Where kernels are kept, those of each version of what they share by themselves."""
    return settings.load().cache_dir / "numba"


def entries() -> list[Entry]:
    """What the cache holds, by name."""
    now, found = time.time(), []
    for path in folder().rglob(f"*{_CODE}"):
        with contextlib.suppress(OSError):
            stat = path.stat()
            found.append(Entry(path, _name(path), stat.st_size, now - stat.st_mtime))
    return sorted(found, key=lambda entry: (entry.name, entry.path))


def clear() -> int:
    """Delete every kept kernel; returns how many."""
    gone = 0
    for path in sorted(folder().rglob("*"), reverse=True):  # what is in a folder before the folder
        with contextlib.suppress(OSError):  # another process was faster, or writes there
            if path.is_dir():
                path.rmdir()
            elif path.suffix in (_CODE, _INDEX):
                path.unlink()
                gone += path.suffix == _CODE
    return gone


def _name(path: Path) -> str:
    """`module.function`, of `module.outer.locals.function-LINE.pyVERSION.NUMBER.nbc`."""
    parts = path.name.rsplit(".", 3)[0].rsplit("-", 1)[0].split(".")
    return f"{parts[0]}.{parts[-1]}"
