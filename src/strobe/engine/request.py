"""A request's life: what was asked for, its sequences while they run, and what comes back.

This module imports no torch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from strobe.engine.grammar import Matcher
from strobe.engine.kv_cache import PageList, Prefix
from strobe.engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from strobe.engine.detokenizer import Detokenizer

FinishReason = Literal["stop", "length", "abort"]


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


@dataclass(slots=True)  # frozen costs 2 us a token more
class StreamChunk:
    """What one step, or some in turn, added to one sequence of a request."""

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

    @staticmethod
    def joined(chunks: Seq[StreamChunk]) -> StreamChunk:
        """One sequence's chunks in their order, as one."""
        last = chunks[-1]
        if len(chunks) == 1:
            return last
        return replace(
            last,
            text="".join(chunk.text for chunk in chunks),
            token_ids=tuple(token for chunk in chunks for token in chunk.token_ids),
            logprobs=tuple(entry for chunk in chunks for entry in chunk.logprobs),
        )


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
    first_token: float | None = None
    started: float | None = None
    """None before its first step."""
    sequences: list[Sequence] = field(default_factory=list, repr=False)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list, repr=False)
    """Entry i is of prompt token i + 1; whole when the first token is drawn."""

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

    `tokens` is the prompt and the output so far, as the host knows it. A step that was launched may have
    drawn one more, `unread` yet: row `row` of what the last step drew. Keys and values of the first
    `computed` tokens are in the cache, or being written by a launched step, in `pages` (none while it
    waits; `prefix` is what it is looked up by). `siblings` are the request's further sequences: they are
    forked from this one when its prompt has been run.
    """

    request: Request
    index: int
    seed: int
    tokens: list[int]
    unread: int = 0
    row: int = 0
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
    matcher: Matcher | None = None
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
    def scores_prompt(self) -> bool:
        """True while prompt tokens lack the log-probabilities that were asked for."""
        if self.params.prompt_logprobs is None or self.index:
            return False
        return len(self.request.prompt_logprobs) < self.prompt_len - 1

    @property
    def output(self) -> list[int]:
        return self.tokens[self.prompt_len :]

    @property
    def output_len(self) -> int:
        """Output tokens, the unread one too."""
        return self.length - self.prompt_len

    @property
    def length(self) -> int:
        """Its tokens, the unread one too."""
        return len(self.tokens) + self.unread

    def chunk(self, text: str) -> StreamChunk:
        """What it has gained since its last chunk; `text` is what that settled."""
        request, start = self.request, self.sent
        self.sent = len(self.output)
        return StreamChunk(
            request_id=request.request_id,
            index=self.index,
            text=text,
            token_ids=tuple(self.output[start:]),
            logprobs=tuple(self.logprobs[start:]),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            metrics=request.metrics(self.finished_at) if request.finished else None,
        )

    def completion(self) -> CompletionOutput:
        return CompletionOutput(
            self.index,
            self.text,
            tuple(self.output),
            tuple(self.logprobs),
            self.finish_reason or "abort",
            self.stop_reason,
        )
