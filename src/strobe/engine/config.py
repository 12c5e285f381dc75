"""What an engine may use, and how it runs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from strobe.errors import SettingsError

_INTEGERS = {
    "page_size": (1, 1024),
    "kv_cache_pages": (1, 1 << 30),
    "max_num_seqs": (1, 1 << 16),
    "max_num_batched_tokens": (1, 1 << 24),
    "max_model_len": (2, 1 << 30),
    "seed": (0, (1 << 63) - 1),
}
_OPTIONAL = ("kv_cache_pages", "max_model_len", "max_num_batched_tokens")
_SWITCHES = ("prefix_cache", "deterministic")
_OPTIONAL_SWITCHES = ("overlap", "graphs")
_STEP_TOKENS, _LARGE_STEP_TOKENS = 2048, 8192
_LARGE_GPU = 64 << 30
"""Bytes of memory, beside which the tensors of a large step are small."""


@dataclass(frozen=True)
class EngineConfig:
    """Sizes and choices of one engine.

    Raises:
        SettingsError: a value out of range, or two that contradict each other.
    """

    page_size: int = 16
    """Tokens of one KV-cache page."""
    kv_cache_pages: int | None = None
    """Pages of the KV cache; None takes `kv_cache_gib`."""
    kv_cache_gib: float | None = None
    """Memory of the KV cache; None takes what `max_num_seqs` full contexts need, bounded by the machine."""
    gpu_memory_fraction: float | None = None
    """Share of a GPU's memory that weights, cache and a step may take together, others' included; None
    leaves a part of what is free."""
    max_num_seqs: int = 512
    """Sequences that run at once; more wait."""
    max_num_batched_tokens: int | None = None
    """Tokens of one forward pass; longer prompts are prefilled in chunks. None: 8192 on a GPU of 64 GiB and
    more, else 2048, and no fewer than `max_num_seqs`."""
    max_model_len: int | None = None
    """Longest prompt and output together; None takes the model's own context."""
    prefix_cache: bool = True
    """Keep the pages of finished requests, and reuse them for prompts that begin alike."""
    attention_kernel: str = "auto"
    linear_kernel: str = "auto"
    """A rung of `strobe.linear`, or several by comma: each product takes the first that fits it."""
    sampling_kernel: str = "auto"
    """How tokens are drawn: "torch", or on a GPU "cuda", one launch without a sort: what auto takes there."""
    overlap: bool | None = None
    """Schedule and launch a step while the one before it runs, and read what it drew a step late. None: on
    a GPU; a CPU runs a step while it is launched, and would only read it late."""
    graphs: bool | None = None
    """On a GPU, where None takes them: run steps that only decode as CUDA graphs, padded to few sizes."""
    deterministic: bool = False
    """A greedy request gives the same tokens, to the bit, whatever else is served with it. Nothing is
    reused between prompts then, prompts run one after the other, and a request waits until it can stay."""
    seed: int = 0
    """Seeds the requests that bring no seed of their own."""

    def __post_init__(self) -> None:
        for name, (low, high) in _INTEGERS.items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                raise SettingsError(f"{name} is {value!r}; supported: an integer from {low} to {high}")
        for name in (*_SWITCHES, *_OPTIONAL_SWITCHES):
            optional = name in _OPTIONAL_SWITCHES and getattr(self, name) is None
            if not optional and not isinstance(getattr(self, name), bool):
                raise SettingsError(f"{name} is {getattr(self, name)!r}; supported: True or False")
        for name in ("attention_kernel", "linear_kernel", "sampling_kernel"):
            if not isinstance(getattr(self, name), str):
                raise SettingsError(f'{name} is {getattr(self, name)!r}; supported: a name, or "auto"')
        if self.deterministic and (self.attention_kernel, self.linear_kernel) != ("auto", "auto"):
            raise SettingsError(
                "deterministic and a kernel by name are both given", hint="deterministic chooses its kernels"
            )
        gib = self.kv_cache_gib
        number = isinstance(gib, (int, float)) and not isinstance(gib, bool)
        if gib is not None and not (number and 0 < gib < math.inf):
            raise SettingsError(f"kv_cache_gib is {gib!r}; supported: a positive number")
        if gib is not None and self.kv_cache_pages is not None:
            raise SettingsError("kv_cache_gib and kv_cache_pages are both given", hint="give one of them")
        fraction = self.gpu_memory_fraction
        number = isinstance(fraction, (int, float)) and not isinstance(fraction, bool)
        if fraction is not None and not (number and 0 < fraction <= 1):
            raise SettingsError(f"gpu_memory_fraction is {fraction!r}; supported: over 0, up to 1")
        if fraction is not None and (gib, self.kv_cache_pages) != (None, None):
            raise SettingsError(
                "gpu_memory_fraction is given beside a size of the KV cache", hint="give one of them"
            )
        if self.step_tokens < self.max_num_seqs:
            raise SettingsError(
                f"max_num_batched_tokens is {self.step_tokens}, max_num_seqs {self.max_num_seqs}; "
                "supported: as many tokens as sequences, or more",
                hint="each running sequence needs a token of every step",
            )

    @property
    def step_tokens(self) -> int:
        """`max_num_batched_tokens`, or what None stands for where no device is known."""
        return self.max_num_batched_tokens or max(_STEP_TOKENS, self.max_num_seqs)

    def on(self, device: str, memory: int) -> EngineConfig:
        """With what None stands for on a device, "cpu" or "cuda", of so many bytes of memory."""
        chosen: dict[str, Any] = {
            name: device == "cuda" for name in _OPTIONAL_SWITCHES if getattr(self, name) is None
        }
        if self.max_num_batched_tokens is None and device == "cuda" and memory >= _LARGE_GPU:
            chosen["max_num_batched_tokens"] = max(_LARGE_STEP_TOKENS, self.max_num_seqs)
        return replace(self, **chosen)
