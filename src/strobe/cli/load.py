"""The model and the sampling that a verb's flags ask for."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from strobe import settings
from strobe.cli import console
from strobe.cpu import jit

if TYPE_CHECKING:
    from strobe.engine import LLM, SamplingParams


def load(
    model: str | None,
    *,
    device: str | None = None,
    dtype: str = "auto",
    kernel: str | None = None,
    linear: str | None = None,
    **engine: Any,
) -> LLM:
    """An engine on `model` (the bundled one, where None). Flags that are None fall to the settings.

    `engine` are fields of EngineConfig.
    """
    from strobe.engine import LLM, EngineConfig, SamplingParams

    chosen = settings.load(device=device, kernel=kernel, linear=linear)
    config = EngineConfig(attention_kernel=chosen.kernel, linear_kernel=chosen.linear, **engine)
    with console.bytes_progress("weights") as progress:
        llm = LLM(model, device=chosen.device, dtype=dtype, config=config, progress=progress)
    tell_memory(llm)
    tell_compiling(llm)
    if llm.engine.model.device.type == "cpu" and llm.engine.max_model_len > 2:
        # on a GPU the engine does so itself: kernels are loaded before a first token is waited for
        llm.generate([[0]], SamplingParams(max_tokens=2, ignore_eos=True))
    return llm


def tell_memory(llm: LLM) -> None:
    """Where a GPU's memory goes, on stderr; a host's is not planned as closely."""
    if llm.engine.model.device.type == "cuda":
        console.note(str(llm.engine.memory))


def tell_compiling(llm: LLM) -> None:
    """Why a first start takes longer, to who waits for it at a terminal."""
    if sys.stderr.isatty() and llm.engine.model.device.type == "cpu" and jit.to_compile():
        console.note("compiling kernels for this CPU, this once")


def sampling(**flags: Any) -> dict[str, Any]:
    """The flags that were given, checked before a model is loaded; the others are the model's to say.

    Raises:
        RequestError: a value out of range.
    """
    from strobe.engine import SamplingParams

    given = {name: value for name, value in flags.items() if value is not None}
    SamplingParams(**given)
    return given


def fit(llm: LLM, wanted: dict[str, Any], *, max_tokens: int) -> SamplingParams:
    """What `sampling` gave over the model's own defaults; `max_tokens`, or the context, where not given."""
    return replace(llm.default_params, **{"max_tokens": min(max_tokens, llm.engine.max_model_len), **wanted})
