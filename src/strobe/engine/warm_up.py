"""What a GPU's first request would wait for: kernels and libraries to load, a first graph to be captured."""

from __future__ import annotations

from typing import TYPE_CHECKING

from strobe.engine.request import Request
from strobe.engine.sampling_params import SamplingParams
from strobe.errors import KernelRefusedError

if TYPE_CHECKING:
    from strobe.engine.engine import Engine

_PROMPT, _OUTPUT = 128, 3
"""Tokens: a prompt, a step that is captured, one that is replayed."""


def warm_up(engine: Engine) -> None:
    """Serve a request that is nobody's, and forget its prefix. Kernels that refuse tell the first caller."""
    cache = engine.scheduler.cache
    prompt = min(_PROMPT, min(engine.max_model_len, cache.num_pages * cache.page_size) - _OUTPUT)
    if prompt < 1:
        return
    params = SamplingParams(temperature=0, max_tokens=_OUTPUT, ignore_eos=True, seed=0)
    engine.add(Request("warm-up", (0,) * prompt, params))
    try:
        while engine.has_work:
            engine.step()
    except KernelRefusedError:
        engine.drop_running()
    engine.scheduler.forget_prefixes()
