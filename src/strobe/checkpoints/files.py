"""Reading small files that somebody else wrote: bounded, and errors name the file."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from strobe.errors import CheckpointError

JSON_LIMIT = 64 << 20
"""Bytes of the largest JSON file read: big vocabularies take a tenth of it."""


def inside(folder: Path, name: object) -> Path:
    """`folder / name`, for a plain file name.

    Raises:
        CheckpointError: the name is no plain file name, and could lead out of the folder.
    """
    if (
        not isinstance(name, str)
        or name in ("", ".", "..")
        or "\0" in name
        or {"/", "\\", os.sep} & set(name)
    ):
        raise CheckpointError(f"{folder} names the file {name!r}; supported: a file in that folder")
    return folder / name


def check_file(path: Path) -> None:
    """Raise CheckpointError unless `path` is an ordinary file: to open a pipe or a device may never end."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path} is no ordinary file")


def read_bytes(path: Path, limit: int) -> bytes:
    """A whole file of at most `limit` bytes.

    Raises:
        CheckpointError: missing, unreadable, no ordinary file, or too large.
    """
    check_file(path)
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    if len(data) > limit:
        raise CheckpointError(f"{path} is larger than {limit:,} bytes")
    return data


def read_json(path: Path, limit: int = JSON_LIMIT) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: as `read_bytes`; not JSON; not an object.
    """
    try:
        value = json.loads(read_bytes(path, limit))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        kind = "null" if value is None else type(value).__name__
        raise CheckpointError(f"{path} holds a JSON {kind}; supported: an object")
    return value
