"""The STROBE_* settings: each one's value and where it came from.

A setting is one field of `Settings`; its environment variable is STROBE_ and the field's name in
capitals. A flag on the command line wins over the environment, which wins over the default. Nothing
is cached: `load()` reads the environment each time.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from strobe.errors import SettingsError, did_you_mean

PREFIX = "STROBE_"
LOG_LEVELS = ("debug", "info", "warning", "error")
DEVICE_NAME = re.compile(r"auto|cpu|cuda(:\d{1,3})?")
DEVICE_NAMES = "auto, cpu, cuda, cuda:N"


def _platform_cache_dir() -> Path:
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "strobe"
    if sys.platform == "win32" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local) / "strobe"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "strobe"


def _path(text: str) -> Path:
    if not text.strip():
        raise ValueError("a folder")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ValueError("a folder; there is no such user") from None


def _device(text: str) -> str:
    if not DEVICE_NAME.fullmatch(text):
        raise ValueError(DEVICE_NAMES)
    return text


def _kernel(text: str) -> str:
    if not re.fullmatch(r"[a-z0-9_]+(/[a-z0-9_]+)?", text):
        raise ValueError("auto or a kernel's name, as `strobe explain` lists them")
    return text


def _kernels(text: str) -> str:
    if not re.fullmatch(r"[a-z0-9_]+(,[a-z0-9_]+)*", text):
        raise ValueError("auto or a kernel's name; several, by comma: the first that fits")
    return text


def _log_level(text: str) -> str:
    if text.lower() not in LOG_LEVELS:
        raise ValueError(", ".join(LOG_LEVELS))
    return text.lower()


def _setting(default: Any, parse: Callable[[str], Any], doc: str) -> Any:
    """`parse` raises ValueError with what is supported. A callable `default` is called at load time."""
    how: dict[str, Any] = {"default_factory" if callable(default) else "default": default}
    return field(**how, metadata={"parse": parse, "doc": doc})


@dataclass(frozen=True)
class Settings:
    """What a user may set for every command and call. Build it with `load()`."""

    cache_dir: Path = _setting(_platform_cache_dir, _path, "folder of compiled kernels")  # noqa: RUF009
    device: str = _setting("auto", _device, "device of models: auto, cpu, cuda or cuda:N")
    kernel: str = _setting("auto", _kernel, "attention kernel of the engine")
    linear: str = _setting("auto", _kernels, "matmul kernel of the engine")
    log_level: str = _setting("warning", _log_level, f"least that is logged: {', '.join(LOG_LEVELS)}")
    sources: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    """Field name → "flag --x" or "STROBE_X"; what is absent is the default."""

    def rows(self) -> list[dict[str, str]]:
        """One row a setting: name, variable, value, source, doc."""
        return [
            {
                "name": f.name,
                "variable": PREFIX + f.name.upper(),
                "value": str(getattr(self, f.name)),
                "source": self.sources.get(f.name, "default"),
                "doc": f.metadata["doc"],
            }
            for f in fields(self)
            if "parse" in f.metadata
        ]


def load(environ: Mapping[str, str] | None = None, **flags: str | None) -> Settings:
    """The settings from `environ` (the process's own, where left out) under `flags` (None: not given).

    Raises:
        SettingsError: a STROBE_* variable that does not exist, or a value that is not supported.
    """
    environ = os.environ if environ is None else environ
    known = {PREFIX + f.name.upper(): f for f in fields(Settings) if "parse" in f.metadata}
    for variable in sorted(environ):
        if variable.startswith(PREFIX) and variable not in known:
            raise SettingsError(
                f"unknown setting {variable}; known: {', '.join(known)}", hint=did_you_mean(variable, known)
            )
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for variable, f in known.items():
        text, source = flags.pop(f.name, None), f"flag --{f.name.replace('_', '-')}"
        if text is None and variable in environ:
            text, source = environ[variable], variable
        if text is None:
            continue
        try:
            values[f.name] = f.metadata["parse"](text)
        except ValueError as error:
            raise SettingsError(f"{source.removeprefix('flag ')} is {text!r}; supported: {error}") from None
        sources[f.name] = source
    if flags:
        raise TypeError(f"no such setting: {', '.join(flags)}")
    return Settings(**values, sources=sources)
