"""A request's life: what was asked for, its sequences while they run, and what comes back.

This module imports no torch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from strobe.engine.kv_cache import PageList, Prefix
from strobe.errors import RequestError

if TYPE_CHECKING:
    from strobe.engine.detokenizer import Detokenizer

FinishReason = Literal["stop", "length", "abort"]

MAX_N = 128
MAX_STOPS = 64
MAX_STOP_CHARS = 1024
MAX_LOGPROBS = 20
MAX_TOKENS = 1 << 20


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
    """0 takes the likeliest token."""
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
        if self.logprobs is not None:
            _check_integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if not isinstance(self.ignore_eos, bool):
            raise RequestError(f"ignore_eos is {self.ignore_eos!r}; supported: True or False")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def penalised(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @cached_property
    def plain(self) -> bool:
        """True where the likeliest token is all that is wanted of the logits."""
        return self.greedy and not self.penalised and self.logprobs is None and self.min_tokens == 0


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


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities at one output position; `top` is (token id, logprob), likeliest first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Metrics:
    """What one request used, and how long it took. Times are seconds."""

    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens whose keys and values came from the prefix cache."""
    output_tokens: int
    queue_s: float
    """From arrival to the first step."""
    ttft_s: float
    """From arrival to the first token."""
    tpot_s: float
    """Mean time between one sequence's tokens; 0 where there is one token."""
    e2e_s: float
    preemptions: int


@dataclass(frozen=True)
class StreamChunk:
    """What one step added to one sequence of a request."""

    request_id: str
    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    """The stop string or the stop token that ended it."""
    metrics: Metrics | None = None
    """The request's, on the last chunk of all its sequences."""


@dataclass(frozen=True)
class CompletionOutput:
    """One finished sequence. `token_ids` holds the stop token, where one ended it; `text` does not."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: FinishReason
    stop_reason: str | int | None


@dataclass(frozen=True)
class RequestOutput:
    """One finished request. `text`, `token_ids` and `finish_reason` are its first output's."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    metrics: Metrics

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        return self.outputs[0].finish_reason


@dataclass(eq=False)
class Request:
    """A prompt and what is wanted of it.

    `stream` asks for a StreamChunk for every token; without it there is one a sequence, at its end.
    Requests share prefix-cache pages only where their `cache_salt` is equal.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    stream: bool = False
    cache_salt: bytes = b""
    arrival: float = field(default_factory=time.monotonic)
    max_output: int = 0
    """Most tokens that `params` and the context allow; set when the engine takes it."""
    started: float | None = None
    first_token: float | None = None
    sequences: list[Sequence] = field(default_factory=list, repr=False)
    """None before its first step."""

    @property
    def finished(self) -> bool:
        return bool(self.sequences) and all(s.finish_reason is not None for s in self.sequences)

    def metrics(self, now: float) -> Metrics:
        """What the request used until `now` (time.monotonic)."""
        first = self.first_token or now
        longest = max(len(sequence.output) for sequence in self.sequences)
        return Metrics(
            prompt_tokens=len(self.prompt_token_ids),
            cached_tokens=self.sequences[0].cached_tokens or 0,
            output_tokens=sum(len(sequence.output) for sequence in self.sequences),
            queue_s=(self.started or now) - self.arrival,
            ttft_s=first - self.arrival,
            tpot_s=(now - first) / (longest - 1) if longest > 1 else 0.0,
            e2e_s=now - self.arrival,
            preemptions=sum(sequence.preemptions for sequence in self.sequences),
        )

    def output(self) -> RequestOutput:
        """The finished request as its caller sees it."""
        return RequestOutput(
            self.request_id,
            self.prompt_token_ids,
            tuple(sequence.completion() for sequence in self.sequences),
            self.metrics(max(sequence.finished_at for sequence in self.sequences)),
        )


@dataclass(eq=False)
class Sequence:
    """One output of a request while it runs.

    `tokens` is the prompt and the output so far. Keys and values of the first `computed` tokens are
    in the cache, in `pages` (none while it waits; `prefix` is what it is looked up by). `siblings` are
    the request's further sequences: they are forked from this one when its prompt has been run.
    """

    request: Request
    index: int
    seed: int
    tokens: list[int]
    computed: int = 0
    pages: PageList = field(default_factory=PageList)
    prefix: Prefix | None = None
    siblings: list[Sequence] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    cached_tokens: int | None = None
    preemptions: int = 0
    finished_at: float = 0.0
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    detokenizer: Detokenizer | None = None
    text: str = ""
    sent: int = 0
    """Output tokens that earlier stream chunks have told of."""

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def prompt_len(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def output(self) -> list[int]:
        return self.tokens[self.prompt_len :]

    @property
    def output_len(self) -> int:
        return len(self.tokens) - self.prompt_len

    def completion(self) -> CompletionOutput:
        return CompletionOutput(
            self.index,
            self.text,
            tuple(self.output),
            tuple(self.logprobs),
            self.finish_reason or "abort",
            self.stop_reason,
        )
