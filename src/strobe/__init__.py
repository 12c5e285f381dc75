"""strobe: exact attention, from the formula to the fastest kernel, and an LLM engine that stands on it.

Importing the package touches no GPU, compiles nothing and imports no torch: each name below is
loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from strobe.attention import AttentionProblem, Dense, Packed, Paged
    from strobe.attention.api import attention
    from strobe.engine import LLM, SamplingParams

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AttentionProblem",
    "Dense",
    "Packed",
    "Paged",
    "SamplingParams",
    "__version__",
    "attention",
]

_HOMES = {
    "AttentionProblem": "strobe.attention",
    "Dense": "strobe.attention",
    "LLM": "strobe.engine",
    "Packed": "strobe.attention",
    "Paged": "strobe.attention",
    "SamplingParams": "strobe.engine",
}


def __getattr__(name: str) -> Any:
    if name == "attention":  # the package, which is callable
        return importlib.import_module("strobe.attention")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
