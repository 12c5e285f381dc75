"""Cubins on disk: `<source>-<arch>-<key>.cubin` files under STROBE_CACHE_DIR/cubins.

A file is a SHA-256 of the rest, a line of JSON, the ELF. Writers write a file of their own and
rename it, so readers and other processes see a whole file or none; one that fails its checksum is
as good as absent. Where the folder cannot be written, cubins live as long as the process, and one
warning says so. What was written longest ago goes once all of them take more than MOST_BYTES: other
versions' kernels, mostly.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

from strobe import settings
from strobe.cuda.cubin import Cubin

SUFFIX = ".cubin"
MOST_BYTES = 1 << 30
_warned = False


@dataclass(frozen=True)
class Entry:
    """One file of the cache. `age_s` counts from its last write."""

    path: Path
    name: str
    arch: str
    defines: tuple[tuple[str, str], ...]
    size: int
    age_s: float


def folder() -> Path:
    """Where cubins are kept."""
    return settings.load().cache_dir / "cubins"


def load(key: str, name: str, arch: str) -> Cubin | None:
    """The cubin of this key, or None where there is none that is whole."""
    try:
        return _decode(_path(key, name, arch).read_bytes())
    except (OSError, ValueError, KeyError, TypeError):
        return None


def save(key: str, cubin: Cubin) -> None:
    """Keep a cubin, whole or not at all."""
    global _warned
    path = _path(key, cubin.name, cubin.arch)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(_encode(cubin))
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        _prune()
    except OSError as error:
        if not _warned:
            _warned = True
            warnings.warn(
                f"compiled kernels are kept in memory only: {path.parent}: {error.strerror} "
                "(hint: set STROBE_CACHE_DIR to a folder that can be written)",
                RuntimeWarning,
                stacklevel=2,
            )


def _prune() -> None:
    """Other processes may read, write and prune beside this one."""
    found = []
    for path in folder().glob(f"*{SUFFIX}"):
        with contextlib.suppress(FileNotFoundError):
            stat = path.stat()
            found.append((stat.st_mtime, stat.st_size, path))
    excess = sum(size for _, size, _ in found) - MOST_BYTES
    for _, size, path in sorted(found):
        if excess <= 0:
            return
        path.unlink(missing_ok=True)
        excess -= size


def entries() -> list[Entry]:
    """What the cache holds, by name."""
    now, found = time.time(), []
    for path in sorted(folder().glob(f"*{SUFFIX}")):
        try:
            cubin, stat = _decode(path.read_bytes()), path.stat()
        except (OSError, ValueError, KeyError, TypeError):
            continue
        found.append(Entry(path, cubin.name, cubin.arch, cubin.defines, stat.st_size, now - stat.st_mtime))
    return found


def clear() -> int:
    """Delete every cached cubin, and what else is kept beside them; returns how many files went."""
    gone = 0
    for path in folder().glob("*"):
        if path.suffix in (SUFFIX, ".json", ".tmp"):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
                gone += 1
    return gone


def _path(key: str, name: str, arch: str) -> Path:
    return folder() / f"{Path(name).stem}-{arch}-{key[:32]}{SUFFIX}"


def _encode(cubin: Cubin) -> bytes:
    head = {"name": cubin.name, "arch": cubin.arch, "defines": cubin.defines, "log": cubin.log}
    body = json.dumps(head).encode() + b"\n" + cubin.image
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def _decode(data: bytes) -> Cubin:
    digest, _, body = data.partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise ValueError("checksum")
    head, _, image = body.partition(b"\n")
    fields = json.loads(head)
    defines = tuple((name, value) for name, value in fields["defines"])
    return Cubin(fields["name"], fields["arch"], defines, image, fields["log"])
