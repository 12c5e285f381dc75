"""What a network is: its sizes and kinds, the same for every checkpoint format."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields

from strobe.errors import CheckpointError

ARCHITECTURES = ("llama", "gpt2")
ROPE_SCALINGS = ("none", "linear", "llama3", "yarn")

LARGEST = {
    "layers": 4096,
    "hidden": 1 << 20,
    "intermediate": 1 << 22,
    "q_heads": 1 << 14,
    "kv_heads": 1 << 14,
    "head_dim": 1 << 12,
    "vocab_size": 1 << 24,
    "max_position": 1 << 30,
}
"""Sizes past these are taken for a broken or hostile file."""


@dataclass(frozen=True)
class Rope:
    """Rotary positions (Su et al. 2021, arXiv 2104.09864) and how they are stretched.

    "linear" divides every frequency by `factor`. "llama3" divides by `factor` where the wavelength
    exceeds `original_max_position / low_freq_factor`, keeps it where it is below
    `original_max_position / high_freq_factor`, and goes smoothly from one to the other between.

    "yarn" (Peng et al. 2023, arXiv 2309.00071) keeps the pairs that turn `beta_fast` times and more in
    `original_max_position`, divides those that turn `beta_slow` times and fewer, and goes from pair to pair
    between; queries and keys both grow by `attention_factor`.
    """

    theta: float = 10000.0
    scaling: str = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0

    def __post_init__(self) -> None:
        if self.scaling not in ROPE_SCALINGS:
            raise CheckpointError(f"rope scaling {self.scaling!r}; supported: {', '.join(ROPE_SCALINGS)}")
        for name in (each.name for each in fields(self) if each.name != "scaling"):
            value = getattr(self, name)
            if not _is_number(value) or not 1e-30 < value < 1e30:  # whose powers are all finite
                raise CheckpointError(f"rope {name} is {value!r}; supported: a positive number up to 1e30")
        if self.scaling == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise CheckpointError(
                f"rope low_freq_factor is {self.low_freq_factor}; "
                f"supported: below high_freq_factor {self.high_freq_factor}"
            )
        if self.scaling == "yarn" and self.theta <= 1:
            raise CheckpointError(f"rope theta is {self.theta}; supported with yarn: above 1")

    def frequencies(self, head_dim: int) -> list[float]:
        """Radians a position of each of a head's pairs: `head_dim / 2` numbers."""
        base = [self.theta ** (-2 * pair / head_dim) for pair in range(head_dim // 2)]
        if self.scaling == "none":
            return base
        if self.scaling == "linear":
            return [turn / self.factor for turn in base]
        if self.scaling == "yarn":
            return self._yarn(base, head_dim)
        return [self._llama3(turn) for turn in base]

    def _llama3(self, turn: float) -> float:
        turns = self.original_max_position * turn / (2 * math.pi)
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = min(1.0, max(0.0, kept))
        return kept * turn + (1 - kept) * turn / self.factor

    def _yarn(self, base: list[float], head_dim: int) -> list[float]:
        def pair(turns: float) -> float:
            """The one that turns so many times in the original context."""
            wavelength = self.original_max_position / (2 * math.pi * turns)
            return head_dim * math.log(wavelength) / (2 * math.log(self.theta))

        first = max(math.floor(pair(self.beta_fast)), 0)
        last = min(math.ceil(pair(self.beta_slow)), head_dim - 1)
        width = last - first or 0.001
        divided = [min(1.0, max(0.0, (i - first) / width)) for i in range(len(base))]
        return [turn * (1 - share + share / self.factor) for turn, share in zip(base, divided, strict=True)]


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and kinds of one network. Built by the checkpoint readers.

    "llama" is RMSNorm, rotary positions, grouped-query attention and SwiGLU: Llama, Mistral, Qwen2
    and Qwen3 differ in the fields below. "gpt2" is LayerNorm, learned positions and a tanh-GELU MLP,
    with a bias on every projection.

    Raises:
        CheckpointError: a field that is missing, of a wrong type, out of range, or at odds with another.
    """

    architecture: str
    layers: int
    hidden: int
    intermediate: int
    q_heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int
    norm_eps: float
    rope: Rope | None = field(default_factory=Rope)
    """None where positions are learned."""
    sliding_window: int | None = None
    """How many keys a query sees, its own included; None for all."""
    sliding_layers: frozenset[int] | None = None
    """The layers that `sliding_window` binds; None for every layer."""
    qkv_bias: bool = False
    output_bias: bool = False
    """A bias on the attention's output projection."""
    qk_norm: bool = False
    """RMSNorm over head_dim on each query and key head, before the rotation."""
    tie_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise CheckpointError(f"architecture {self.architecture!r}; supported: {known}")
        for name, largest in LARGEST.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= largest:
                raise CheckpointError(f"{name} is {value!r}; supported: an integer from 1 to {largest}")
        if not _is_number(self.norm_eps) or not 0 <= self.norm_eps < 1:
            raise CheckpointError(f"norm_eps is {self.norm_eps!r}; supported: a number from 0 to 1")
        if self.q_heads % self.kv_heads:
            raise CheckpointError(f"q_heads {self.q_heads} is not a multiple of kv_heads {self.kv_heads}")
        if (self.rope is None) != (self.architecture == "gpt2"):
            raise CheckpointError(f"rope is {self.rope}; supported: some for llama, None for gpt2")
        if self.rope is not None and self.head_dim % 2:
            raise CheckpointError(f"head_dim {self.head_dim} is odd; rotary positions turn pairs")
        window, largest = self.sliding_window, LARGEST["max_position"]
        if window is not None and (type(window) is not int or not 1 <= window <= largest):
            raise CheckpointError(f"sliding_window is {window!r}; supported: None or 1 to {largest}")
        if self.bos_token_id is not None:
            _check_token("bos_token_id", self.bos_token_id)
        for token in self.eos_token_ids:
            _check_token("eos_token_ids", token)

    @property
    def q_size(self) -> int:
        """Elements of one token's queries."""
        return self.q_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Elements of one token's keys, and of its values, in one layer."""
        return self.kv_heads * self.head_dim

    @property
    def frequencies(self) -> list[float]:
        """The rotation of each of a head's pairs; empty where positions are learned."""
        return [] if self.rope is None else self.rope.frequencies(self.head_dim)

    @property
    def softmax_scale(self) -> float | None:
        """`strobe.attention`'s scale, with what YaRN adds to queries and keys; None for head_dim ** -0.5."""
        if self.rope is None or self.rope.attention_factor == 1:
            return None
        return float(self.head_dim**-0.5 * self.rope.attention_factor**2)

    def window(self, layer: int) -> tuple[int, int]:
        """A layer's attention window as `strobe.attention` takes it: (left, right), -1 for no limit."""
        bound = self.sliding_layers is None or layer in self.sliding_layers
        return (self.sliding_window - 1, -1) if self.sliding_window is not None and bound else (-1, -1)


def _check_token(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise CheckpointError(f"{name} holds {value!r}; supported: integers from 0")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
