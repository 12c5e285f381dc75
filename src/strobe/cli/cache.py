"""`strobe cache`: the compiled kernels on disk."""

from __future__ import annotations

from typing import Annotated

import typer

from strobe.cli import console
from strobe.cli.options import Json

app = typer.Typer(help="The compiled kernels on disk.", no_args_is_help=True)


@app.command("list")
def list_(json: Json = False) -> None:
    """List the compiled kernels."""
    from strobe.cuda import cache

    entries = cache.entries()
    if json:
        console.write_json(
            [
                {
                    "name": e.name,
                    "arch": e.arch,
                    "defines": dict(e.defines),
                    "bytes": e.size,
                    "age_s": e.age_s,
                }
                for e in entries
            ]
        )
        return
    if not entries:
        console.note(f"no compiled kernels in {cache.folder()}")
        return
    rows = [
        [e.name, e.arch, " ".join(f"{k}={v}" for k, v in e.defines), console.bytes_text(e.size)]
        for e in entries
    ]
    console.write_table(["kernel", "arch", "defines", "size"], rows)


@app.command()
def warm(
    arch: Annotated[
        str | None, typer.Option(help="As sm_90a; needs no GPU.", show_default="this machine's GPU")
    ] = None,
) -> None:
    """Compile every kernel now, so that no first call waits."""
    from strobe.attention.ladder import RUNGS
    from strobe.cuda import jit

    target = arch or jit.arch_of()
    sources = [
        source for rung in RUNGS.values() for source in getattr(rung.module, "sources", lambda _: [])(target)
    ]
    bar, task = console.progress(len(sources), f"compiling for {target}")
    with bar:
        count = jit.warm(sources, target, lambda source, cubin: bar.advance(task))
    console.note(f"{count} kernels for {target} are compiled")


@app.command()
def clear() -> None:
    """Delete every compiled kernel."""
    from strobe.cuda import cache

    console.note(f"{cache.clear()} compiled kernels deleted from {cache.folder()}")
