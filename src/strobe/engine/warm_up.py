"""What a GPU's first requests would wait for: kernels to compile and to load, libraries, a first graph."""

from __future__ import annotations

from typing import TYPE_CHECKING

from strobe.cuda import jit
from strobe.engine.graphs import LARGEST, decode_sizes
from strobe.engine.request import Request
from strobe.engine.sampling_params import SamplingParams
from strobe.errors import KernelRefusedError
from strobe.models.network import products

if TYPE_CHECKING:
    from strobe.engine.engine import Engine

_PROMPTS, _OUTPUT = (128, LARGEST + 1), 3
"""Tokens: a prompt that is captured, and one that is not; steps that are captured, and replayed."""


def warm_up(engine: Engine) -> None:
    """Compile what decoding any number of sequences takes, several kernels at a time; then serve requests
    that are nobody's, and forget their prefixes. Kernels that refuse tell the first caller."""
    cache = engine.scheduler.cache
    room = min(engine.max_model_len, cache.num_pages * cache.page_size) - _OUTPUT
    params = SamplingParams(temperature=0, max_tokens=_OUTPUT, ignore_eos=True, seed=0)
    try:
        if not engine.config.deterministic:
            _compile(engine)
        for prompt in _PROMPTS:
            if room > 0:
                engine.add(Request("warm-up", (0,) * min(prompt, room), params))
            while engine.has_work:
                engine.step()
            cache.clear()
    except KernelRefusedError:
        engine.drop_running()
    engine.scheduler.forget_prefixes()


def _compile(engine: Engine) -> None:
    sources = {}
    kernel = engine.config.linear_kernel
    for projection, residual, heads in products(engine.model):
        for tokens in decode_sizes(engine.config.max_num_seqs):
            source = projection.source(tokens, residual=residual, append=heads, kernel=kernel)
            if source is not None:
                sources[source.path, tuple(source.defines.items())] = source
    jit.warm(sources.values(), jit.arch_of(engine.model.device.index))
