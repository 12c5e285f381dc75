"""Every error that a user of strobe can meet.

A message says what was given and what is supported; `hint` says what to do next. The command line
prints both on one line and exits with code 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_LONGEST = 8192
"""Characters of a message: it may quote what a hostile file holds."""


def did_you_mean(given: str, known: Iterable[str]) -> str | None:
    """A hint with the name in `known` nearest to `given`; None where none is near."""
    near = difflib.get_close_matches(given, list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else None


class StrobeError(Exception):
    """Base of all errors raised on purpose. `str(error)` is the whole story on one line."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        message = message if len(message) <= _LONGEST else f"{message[:_LONGEST]} ..."
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} (hint: {self.hint})" if self.hint else self.message


class ProblemError(StrobeError, ValueError):
    """The inputs of an attention call do not fit together."""


class UnknownNameError(StrobeError, ValueError):
    """A kernel, model, setting or option that does not exist."""

    @classmethod
    def among(cls, what: str, given: str, known: Iterable[str]) -> UnknownNameError:
        """`what` is the kind of thing ("kernel"); the message lists `known` and the nearest name."""
        known, given = list(known), f"{given!s:.100}"
        return cls(f"unknown {what} {given!r}; known: {', '.join(known)}", hint=did_you_mean(given, known))


class KernelRefusedError(StrobeError):
    """A kernel asked for by name cannot run the problem; the message holds each of its reasons."""


class CompileError(StrobeError):
    """A CUDA source did not compile; the message holds the compiler's own line."""


class DeviceError(StrobeError):
    """The machine lacks what was asked for, or a driver call failed."""


class CheckpointError(StrobeError):
    """A model folder or file is missing, broken, or of an unknown kind."""


class TokenizerError(CheckpointError):
    """A tokenizer file is missing or broken."""


class RequestError(StrobeError, ValueError):
    """A prompt or its sampling parameters cannot be served."""


class OutOfPagesError(StrobeError):
    """A request needs more KV-cache pages than the whole cache has."""


class SettingsError(StrobeError, ValueError):
    """A STROBE_* variable, or a field of an engine's or a server's configuration, holds what it cannot."""


class MissingExtraError(StrobeError, ImportError):
    """An optional library is not installed."""

    @classmethod
    def of(cls, library: str, extra: str) -> MissingExtraError:
        return cls(f"{library} is not installed", hint=f"pip install 'strobe[{extra}]'")
