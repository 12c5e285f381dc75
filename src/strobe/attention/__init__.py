"""Exact attention: one problem, one ladder of implementations.

The package is the function too: `strobe.attention(q, k, v, causal=True)` calls `api.attention`, which
imports torch with its first use. Problems and layouts need none.
"""

from __future__ import annotations

import inspect
import sys
from types import ModuleType
from typing import Any, cast

from strobe.attention.problem import AttentionProblem, Dense, Packed, Paged

__all__ = ["AttentionProblem", "Dense", "Packed", "Paged", "attention"]


class _CallablePackage:
    """The package, with its own names, and a call. No ModuleType: torch.compile would not trace its call."""

    def __init__(self, names: dict[str, Any]) -> None:
        self.__dict__ = names

    def __getattr__(self, name: str) -> Any:
        if name != "attention":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from strobe.attention.api import attention

        self.attention = attention
        return attention

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.attention)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.attention(*args, **kwargs)


sys.modules[__name__] = cast(ModuleType, _CallablePackage(globals()))
