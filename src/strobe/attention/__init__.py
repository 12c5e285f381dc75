"""Exact attention: one problem, one ladder of implementations.

The package is the function too: `strobe.attention(q, k, v, causal=True)` calls `api.attention`, which
imports torch with its first use. Problems and layouts need none.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

from strobe.attention.problem import AttentionProblem, Dense, Packed, Paged

__all__ = ["AttentionProblem", "Dense", "Packed", "Paged", "attention"]


def __getattr__(name: str) -> Any:
    if name == "attention":
        return importlib.import_module("strobe.attention.api").attention
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _CallablePackage(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return __getattr__("attention")(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
