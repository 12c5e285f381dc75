"""Requests in, text out: scheduling, the KV cache, sampling, and `LLM` over them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from strobe.engine.config import EngineConfig
    from strobe.engine.engine import Engine
    from strobe.engine.llm import LLM
    from strobe.engine.request import Metrics, Request, RequestOutput, StreamChunk
    from strobe.engine.sampling_params import SamplingParams

__all__ = [
    "LLM",
    "Engine",
    "EngineConfig",
    "Metrics",
    "Request",
    "RequestOutput",
    "SamplingParams",
    "StreamChunk",
]

_HOMES = {
    "LLM": "llm",
    "Engine": "engine",
    "EngineConfig": "config",
    "Metrics": "request",
    "Request": "request",
    "RequestOutput": "request",
    "SamplingParams": "sampling_params",
    "StreamChunk": "request",
}


def __getattr__(name: str) -> Any:
    """Names are loaded when first used: the scheduler and the cache import no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
