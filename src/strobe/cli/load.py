"""The model that a verb's flags name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from strobe import settings

if TYPE_CHECKING:
    from strobe.engine import LLM


def load(
    model: str | None,
    *,
    device: str | None = None,
    dtype: str = "auto",
    kernel: str | None = None,
    linear: str | None = None,
    kv_cache_gib: float | None = None,
) -> LLM:
    """An engine on `model` (the bundled one, where None). Flags that are None fall to the settings."""
    from strobe.engine import LLM, EngineConfig

    chosen = settings.load(device=device, kernel=kernel, linear=linear)
    config = EngineConfig(
        attention_kernel=chosen.kernel, linear_kernel=chosen.linear, kv_cache_gib=kv_cache_gib
    )
    return LLM(model, device=chosen.device, dtype=dtype, config=config)
