"""Data goes to stdout, talk to stderr; colour and progress bars to a terminal only."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table


def error(message: str) -> None:
    """One line on stderr. It is not wrapped to the terminal's width, so that it stays one line."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print("[bold red]error:[/]", end=" ")
    console.print(message, markup=False)


def note(message: str) -> None:
    """A dim line on stderr: timings, hints, what is being done."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(message, style="dim", markup=False)


def write(text: str) -> None:
    """Text to stdout as it comes, unchanged and at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def write_json(value: Any, *, indent: int | None = 2) -> None:
    write(json.dumps(value, indent=indent, ensure_ascii=False, default=str) + "\n")


def write_table(columns: list[str], rows: list[list[str]]) -> None:
    """A table on stdout; where stdout is no terminal its lines are as wide as they need to be.

    Columns without names give a table without a head.
    """
    table = Table(
        box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", show_header=any(columns)
    )
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 10_000
    console.print(table)


def progress(total: int, what: str) -> tuple[Progress, Any]:
    """A bar over `total` things on stderr, shown on a terminal only. Use the first as a context."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    return bar, bar.add_task(what, total=total)


@contextmanager
def bytes_progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar over bytes on stderr, shown on a terminal only; what is given is told (done, of)."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    with bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def bytes_text(count: int) -> str:
    """A size for people: "1.5 GiB"."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"
