"""What a GPU's first requests would wait for: kernels to compile and to load, libraries, a first graph."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from strobe.cuda import jit
from strobe.engine.graphs import LARGEST, decode_sizes
from strobe.engine.request import Request
from strobe.engine.sampling_params import SamplingParams
from strobe.errors import KernelRefusedError
from strobe.models.network import products

if TYPE_CHECKING:
    from strobe.engine.engine import Engine

_PROMPTS, _OUTPUT = ((128, 1), (LARGEST + 1, 2)), 3
"""Tokens and rows: a prompt that is captured, then one that is not, with decode steps of two rows, which
take other kernels than those of one; tokens that are drawn: steps that are captured, and replayed."""


def warm_up(engine: Engine) -> None:
    """Compile what decoding any number of sequences takes, several kernels at a time; then serve requests
    that are nobody's, and forget their prefixes. Kernels that refuse tell the first caller."""
    cache = engine.scheduler.cache
    capacity = cache.num_pages * cache.page_size
    room = min(engine.max_model_len, capacity) - _OUTPUT
    params = SamplingParams(temperature=0, max_tokens=_OUTPUT, ignore_eos=True, seed=0)
    try:
        if not engine.config.deterministic:
            _compile(engine)
        for prompt, rows in _PROMPTS:
            fits = rows <= engine.config.max_num_seqs and 2 * rows * (prompt + _OUTPUT) <= capacity
            if room > 0:
                chosen = replace(params, n=rows) if fits else params
                engine.add(Request("warm-up", (0,) * min(prompt, room), chosen))
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
