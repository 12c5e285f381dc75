"""How the tokens of one request are drawn, with a bound on every number.

This module imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from functools import cached_property

from strobe.engine.grammar import Grammar
from strobe.errors import RequestError

MAX_N = 128
MAX_STOPS = 64
MAX_STOP_CHARS = 1024
MAX_LOGPROBS = 20
MAX_TOKENS = 1 << 20
MAX_BIASES = 1024
_COLDEST = 1e-5


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are drawn.

    The order is: penalties, temperature, top_k, top_p, min_p (see `strobe.ops.sampling`).

    Raises:
        RequestError: a value of a wrong type or out of range; the message names the field.
    """

    max_tokens: int | None = None
    """None for as many as the context holds."""
    temperature: float = 1.0
    """0 takes the likeliest token; below 1e-5 counts as 0, for the quotient must stay finite in float32."""
    top_k: int = 0
    """Draw among the k likeliest tokens; 0 or -1 for all."""
    top_p: float = 1.0
    """Draw among the fewest tokens whose probabilities sum to at least this."""
    min_p: float = 0.0
    """Leave out tokens less likely than this share of the likeliest one's probability."""
    repetition_penalty: float = 1.0
    """Divides the positive logits, and multiplies the negative ones, of tokens in prompt or output."""
    presence_penalty: float = 0.0
    """Taken off the logit of each token in the output."""
    frequency_penalty: float = 0.0
    """Taken off the logit of each token once for every time it is in the output."""
    seed: int | None = None
    """The same seed draws the same tokens, whatever else runs."""
    n: int = 1
    """Outputs for the prompt."""
    stop: str | SequenceOf[str] = ()
    """Strings that end the output; they are not part of its text."""
    stop_token_ids: SequenceOf[int] = ()
    """Tokens that end the output besides the model's own; their text is left out."""
    ignore_eos: bool = False
    min_tokens: int = 0
    """No stop before this many tokens."""
    logprobs: int | None = None
    """Log-probabilities (natural, before penalties and temperature) of the chosen token and of this
    many likeliest ones; None for none."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens from the second on, in `Request.prompt_logprobs`."""
    logit_bias: Mapping[int, float] | SequenceOf[tuple[int, float]] = ()
    """Added to the logits of these tokens."""
    grammar: Grammar | None = None
    """What the output must keep to; it ends where the grammar does."""

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        object.__setattr__(self, "stop", _tuple("stop", stop, str, MAX_STOPS))
        object.__setattr__(
            self, "stop_token_ids", _tuple("stop_token_ids", self.stop_token_ids, int, MAX_STOPS)
        )
        if any(not 1 <= len(text) <= MAX_STOP_CHARS for text in self.stop):
            raise RequestError(f"stop holds a string that is empty or over {MAX_STOP_CHARS} characters")
        if any(not 0 <= token < 1 << 31 for token in self.stop_token_ids):
            raise RequestError("stop_token_ids holds a number that is no token id")
        for name, low, high in (
            ("temperature", 0.0, 100.0),
            ("top_p", 0.0, 1.0),
            ("min_p", 0.0, 1.0),
            ("repetition_penalty", 0.01, 100.0),
            ("presence_penalty", -100.0, 100.0),
            ("frequency_penalty", -100.0, 100.0),
        ):
            _check_number(name, getattr(self, name), low, high)
        if self.temperature < _COLDEST:
            object.__setattr__(self, "temperature", 0.0)
        if self.top_p == 0:
            raise RequestError(
                "top_p is 0; supported: over 0, up to 1", hint="temperature=0 takes the likeliest token"
            )
        _check_integer("top_k", self.top_k, -1, 1 << 31)
        _check_integer("n", self.n, 1, MAX_N)
        _check_integer("min_tokens", self.min_tokens, 0, MAX_TOKENS)
        if self.max_tokens is not None:
            _check_integer("max_tokens", self.max_tokens, 1, MAX_TOKENS)
            if self.min_tokens > self.max_tokens:
                raise RequestError(f"min_tokens {self.min_tokens} is over max_tokens {self.max_tokens}")
        if self.seed is not None:
            _check_integer("seed", self.seed, -(1 << 63), (1 << 64) - 1)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _check_integer(name, getattr(self, name), 0, MAX_LOGPROBS)
        if isinstance(self.logit_bias, Mapping):
            object.__setattr__(self, "logit_bias", tuple(self.logit_bias.items()))
        if not isinstance(self.logit_bias, (list, tuple)) or not all(map(_is_pair, self.logit_bias)):
            raise RequestError(f"logit_bias is {self.logit_bias!r:.60}; supported: token ids to numbers")
        object.__setattr__(self, "logit_bias", tuple(map(tuple, self.logit_bias)))
        if len(self.logit_bias) > MAX_BIASES:
            raise RequestError(
                f"logit_bias holds {len(self.logit_bias)} tokens; supported: up to {MAX_BIASES}"
            )
        for token, bias in self.biases:
            _check_integer("a token of logit_bias", token, 0, (1 << 31) - 1)
            _check_number(f"logit_bias of token {token}", bias, -100.0, 100.0)
        if self.grammar is not None and not callable(getattr(self.grammar, "matcher", None)):
            raise RequestError(f"grammar is a {type(self.grammar).__name__}; supported: a compiled grammar")
        if self.grammar is not None and self.min_tokens:
            raise RequestError(
                "min_tokens and a grammar are both given", hint="the grammar says where it ends"
            )
        if not isinstance(self.ignore_eos, bool):
            raise RequestError(f"ignore_eos is {self.ignore_eos!r}; supported: True or False")

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        """`logit_bias` as (token id, bias)."""
        return self.logit_bias  # type: ignore[return-value]

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def penalised(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @cached_property
    def plain(self) -> bool:
        """True where the likeliest token is all that is wanted of the logits."""
        draws = not self.greedy or self.penalised or self.logit_bias or self.grammar is not None
        return not draws and self.logprobs is None and self.min_tokens == 0


def _is_pair(item: object) -> bool:
    return isinstance(item, (list, tuple)) and len(item) == 2


def _check_number(name: str, value: object, low: float, high: float) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not low <= value <= high:  # type: ignore[arg-type, operator]
        raise RequestError(f"{name} is {value!r}; supported: {low:g} to {high:g}")


def _check_integer(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise RequestError(f"{name} is {value!r}; supported: an integer from {low} to {high}")


def _tuple(name: str, values: object, kind: type, longest: int) -> tuple:
    if not isinstance(values, (list, tuple)) or any(type(value) is not kind for value in values):
        raise RequestError(f"{name} is {values!r:.60}; supported: a list of {kind.__name__}")
    if len(values) > longest:
        raise RequestError(f"{name} holds {len(values)} entries; supported: up to {longest}")
    return tuple(values)
