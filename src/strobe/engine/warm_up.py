"""What a GPU's first requests would wait for: kernels to compile and to load, libraries, a first graph."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from strobe.attention import ladder
from strobe.cuda import jit
from strobe.engine.graphs import LARGEST, decode_sizes
from strobe.engine.request import Request
from strobe.engine.sampling_params import SamplingParams
from strobe.errors import KernelRefusedError
from strobe.models.network import decode_attention, products

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
    model, config = engine.model, engine.config
    found: list[jit.Source | None] = []
    for rows in decode_sizes(config.max_num_seqs):
        for projection, residual, heads in products(model):
            found.append(
                projection.source(rows, residual=residual, append=heads, kernel=config.linear_kernel)
            )
        problem = decode_attention(model, rows, engine.max_model_len, config.page_size)
        found.append(ladder.choose(problem, config.attention_kernel).source(problem))
    sources = {(source.path, *source.defines.items()): source for source in found if source is not None}
    jit.warm(sources.values(), jit.arch_of(model.device.index))
