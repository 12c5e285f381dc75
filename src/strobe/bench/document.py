"""Keeps the tables of README.md and docs/, and the figures they show, equal to the committed results.

A table stands between `<!-- results: NAME -->` and `<!-- end -->`; NAME is `machine/table`, as in
`h200/prefill`, with a `?` behind it where the result may be missing. A figure stands beside its result.
`python -m strobe.bench.document` makes them all anew, `--check` says which are stale.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

from strobe.bench import decode_figure, engine_figure, plots
from strobe.bench.document_tables import TABLES
from strobe.bench.results import Result
from strobe.errors import StrobeError, UnknownNameError

RESULTS = Path("benchmarks/results")
_BLOCK = re.compile(r"(<!-- results: (?P<name>[\w/-]+)(?P<optional>\??) -->\n).*?(<!-- end -->)", re.DOTALL)


def documents(root: Path) -> list[Path]:
    """The files that may hold tables."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def render(text: str, root: Path) -> str:
    """The document with every table made anew. Raises StrobeError where a result file is missing."""

    def fresh(block: re.Match[str]) -> str:
        machine, _, name = block["name"].partition("/")
        if name not in TABLES:
            raise UnknownNameError.among("table", name, TABLES)
        bench, make = TABLES[name]
        path = root / RESULTS / machine / f"{bench}.json"
        if not path.is_file() and block["optional"]:
            return f"{block[1]}\n*Not measured yet.*\n\n{block[4]}"
        if not path.is_file():
            raise StrobeError(f"table {block['name']} needs {path}, which is not there")
        result = Result.load(path)
        return f"{block[1]}\n{make(result)}\n{_origin(result)}\n\n{block[4]}"

    return _BLOCK.sub(fresh, text)


def _origin(result: Result) -> str:
    device = result.machine.get("gpu") or result.machine.get("cpu", "")
    torch = result.versions.get("torch", "")
    return f"*{device}, torch {torch}, strobe {result.commits}, {result.when[:10]}.*"


FIGURES: dict[str, tuple[Callable[[Result], bool], Callable[[Result, Path], None]]] = {
    "roofline": (lambda result: True, plots.roofline),
    "decode": (decode_figure.drawable, decode_figure.against_context),
    "engine": (engine_figure.drawable, engine_figure.against_floor),
}
"""By result file: whether it holds what its figure shows, and how that is drawn."""


def stale_figures(root: Path) -> list[tuple[Result, Path]]:
    """The figures that are not there or were not drawn from the result beside them, which they name."""
    return [
        (result, figure)
        for path in sorted((root / RESULTS).glob("*/*.json"))
        if path.stem in FIGURES
        for result in [Result.load(path)]
        if FIGURES[path.stem][0](result)
        for figure in (path.with_suffix(".png"), path.with_suffix(".svg"))
        if not figure.is_file() or plots.title_of(result).encode() not in figure.read_bytes()
    ]


def main(arguments: list[str]) -> int:
    """Make the tables and figures below the current folder; with `--check` name the stale ones, return 1."""
    root, stale = Path.cwd(), []
    for result, figure in stale_figures(root):
        stale.append(figure.relative_to(root))
        if "--check" not in arguments:
            FIGURES[figure.stem][1](result, figure)
    for path in documents(root):
        text = path.read_text(encoding="utf-8")
        fresh = render(text, root)
        if fresh == text:
            continue
        stale.append(path.relative_to(root))
        if "--check" not in arguments:
            path.write_text(fresh, encoding="utf-8")
    for path in stale:
        sys.stderr.write(f"{path}: {'stale: make results' if '--check' in arguments else 'made'}\n")
    return 1 if stale and "--check" in arguments else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except StrobeError as error:
        sys.exit(f"error: {error}")
