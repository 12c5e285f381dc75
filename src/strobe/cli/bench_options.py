"""Flags that the benchmark verbs share, and how they end: the file, the figure, JSON."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from strobe.cli import console
from strobe.errors import SettingsError, StrobeError, UnknownNameError

if TYPE_CHECKING:
    from strobe.bench.results import Row
    from strobe.engine import EngineConfig

Random = Annotated[
    str | None,
    typer.Option(
        "--random",
        help="Random weights of a published shape, in a model's place: llama3.2-1b, llama3-8b, gpt2, ...",
        show_default=False,
    ),
]
Prompt = Annotated[int, typer.Option(help="Prompt tokens.")]
Output = Annotated[int, typer.Option(help="Output tokens.")]
Runs = Annotated[int, typer.Option(help="Times that each is measured.")]
EngineOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--engine",
        help="A field of EngineConfig, as max_num_seqs=512; may be given several times.",
        show_default=False,
    ),
]


def check_runs(runs: int) -> None:
    if not 1 <= runs <= 1000:
        raise StrobeError(f"runs is {runs}; supported: 1 to 1000")


def names(text: str | None, known: tuple[str, ...]) -> tuple[str, ...]:
    """ "a,b" → ("a", "b"), each of them known."""
    found = tuple(dict.fromkeys(name.strip() for name in (text or "").split(",") if name.strip()))
    for name in found:
        if name not in known:
            raise UnknownNameError.among("peer", name, known)
    return found


def engine_config(given: list[str] | None, **defaults: Any) -> EngineConfig:
    """`defaults` with what `--engine NAME=VALUE` says in their place."""
    from strobe.engine import EngineConfig

    known = {field.name: str(field.type) for field in fields(EngineConfig)}
    chosen = {name: value for name, value in defaults.items() if name in known and value is not None}
    for text in given or ():
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if name not in known:
            raise UnknownNameError.among("engine setting", name, known)
        if not equals:
            raise SettingsError(f"--engine {text}", hint=f"--engine {name}=VALUE")
        chosen[name] = _value(value.strip(), known[name])
    return EngineConfig(**chosen)


def _value(text: str, kind: str) -> Any:
    """A field's value, by the type that it is declared with; EngineConfig says what is wrong with it."""
    if text.lower() == "none":
        return None
    if "bool" in kind and text.lower() in ("true", "false"):
        return text.lower() == "true"
    for number, convert in (("int", int), ("float", float)):
        if number in kind:
            try:
                return convert(text)
            except ValueError:
                continue
    return text


def finish(
    bench: str,
    rows: list[Row],
    *,
    save: Path | None,
    commit: str | None,
    json: bool,
    ceilings: dict[str, Any] | None = None,
) -> bool:
    """Write the result file and JSON where they were asked for; True where stdout has what it was to have."""
    from strobe.bench.results import Result, default_path

    result = Result.here(bench, rows, commit=commit, **({} if ceilings is None else {"ceilings": ceilings}))
    if save is not None:
        result.save(default_path(bench) if str(save) == "auto" else save)
    if json:
        console.write_json(result.__dict__)
    return json
