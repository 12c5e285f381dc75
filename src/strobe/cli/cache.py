"""`strobe cache`: the compiled kernels on disk."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from strobe import device as devices
from strobe.cli import console
from strobe.cli.options import Json
from strobe.errors import DeviceError, SettingsError

app = typer.Typer(help="The compiled kernels on disk.", no_args_is_help=True)


@app.command("list")
def list_(json: Json = False) -> None:
    """List the compiled kernels."""
    from strobe.cpu import cache as cpu_cache
    from strobe.cuda import cache

    kept = [(e.name, e.arch, dict(e.defines), e.size, e.age_s) for e in cache.entries()]
    kept += [(e.name, "cpu", {}, e.size, e.age_s) for e in cpu_cache.entries()]
    if json:
        names = ("name", "arch", "defines", "bytes", "age_s")
        console.write_json([dict(zip(names, entry, strict=True)) for entry in kept])
        return
    if not kept:
        console.note(f"no compiled kernels in {cache.folder()} and {cpu_cache.folder()}")
        return
    rows = [
        [name, arch, " ".join(f"{k}={v}" for k, v in defines.items()), console.bytes_text(size)]
        for name, arch, defines, size, _ in kept
    ]
    console.write_table(["kernel", "arch", "defines", "size"], rows)


@app.command()
def warm(
    arch: Annotated[
        str | None, typer.Option(help="As sm_90a; needs no GPU.", show_default="this machine's GPU")
    ] = None,
) -> None:
    """Compile every kernel now, so that no first call waits."""
    from strobe.cuda import cache, jit
    from strobe.cuda import sources as kernel_sources

    folder = cache.folder()
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise SettingsError(f"{folder} cannot be written", hint="set STROBE_CACHE_DIR")
    if arch is None and not devices.has_gpu():
        raise DeviceError("no GPU here to compile for", hint="name an arch, as --arch sm_90a")
    target = kernel_sources.check_arch(arch or jit.arch_of())
    sources = kernel_sources.every(target)
    bar, task = console.progress(len(sources), f"compiling for {target}")
    with bar:
        count = jit.warm(sources, target, lambda source, cubin: bar.advance(task))
    console.note(f"{count} kernels for {target} are compiled")


@app.command()
def clear() -> None:
    """Delete every compiled kernel."""
    from strobe.cpu import cache as cpu_cache
    from strobe.cuda import cache

    for each in (cache, cpu_cache):
        console.note(f"{each.clear()} compiled kernels deleted from {each.folder()}")
