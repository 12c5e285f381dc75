"""Exact attention: one problem, one ladder of implementations."""

from strobe.attention.problem import AttentionProblem, Dense, Packed, Paged

__all__ = ["AttentionProblem", "Dense", "Packed", "Paged", "attention"]


def __getattr__(name: str):  # noqa: ANN202  (torch is imported with the first use of attention())
    if name == "attention":
        from strobe.attention.api import attention

        return attention
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
