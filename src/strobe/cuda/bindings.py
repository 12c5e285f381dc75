"""NVIDIA's Python bindings, which few machines have."""

from __future__ import annotations

import importlib
from typing import Any

from strobe.errors import DeviceError


def load(module: str, probe: str, called: str, hint: str) -> Any:
    """`cuda.bindings.<module>`, whose function `probe` answers where the library behind it is there.

    Raises:
        DeviceError: one of them is missing; `called` cannot be loaded, and `hint`.
    """
    try:
        found = importlib.import_module(f"cuda.bindings.{module}")
        getattr(found, probe)()
    except (ImportError, RuntimeError) as error:
        raise DeviceError(f"{called} cannot be loaded: {' '.join(str(error).split())}", hint=hint) from error
    return found
