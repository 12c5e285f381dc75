"""/v1/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

from strobe.engine.request import Metrics, StreamChunk, TokenLogprobs
from strobe.server.answers import Completion, PromptDetails, TextChoice, TextLogprobs, Usage
from strobe.server.bridge import Stream
from strobe.server.errors import ApiError
from strobe.server.replies import Event, EventReply, JsonReply, off_loop_if_long
from strobe.server.schema import CompletionRequest
from strobe.server.service import Service, named_stop

MAX_REPEATED = 1 << 20
"""Tokens of prompts in one answer: each of a prompt's `n` outputs tells them anew where they are wanted."""


@dataclass(eq=False)
class _Choice:
    """One output on its way to the client."""

    prompt: str
    """What `echo` puts before the text."""
    prompt_ids: tuple[int, ...]
    prompt_logprobs: list[TokenLogprobs]
    offset: int = 0
    """Characters of all tokens so far, for `text_offset`."""
    begun: bool = False


class CompletionRun:
    """One call of /v1/completions, once its prompts are in the queue."""

    def __init__(self, service: Service, body: CompletionRequest, model: str, texts: Sequence[str]) -> None:
        self.service = service
        self.body = body
        self.texts = texts
        self.head: dict[str, Any] = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        self.metrics: list[Metrics] = []

    @property
    def silent(self) -> bool:
        """True where the prompt alone is wanted back: the engine still draws one token."""
        return self.body.max_tokens == 0

    def begin(self, stream: Stream) -> None:
        """Keep one `_Choice` for each prompt and output."""
        self.stream = stream
        self.choices = [
            _Choice(text, request.prompt_token_ids, request.prompt_logprobs)
            for text, request in zip(self.texts, stream.requests, strict=True)
            for _ in range(self.body.n or 1)
        ]

    async def whole(self) -> Completion:
        """The answer in one piece."""
        done: dict[int, TextChoice] = {}
        try:
            async for chunk in self.stream:
                choice = await off_loop_if_long(self._text_choice, chunk, self._scored(chunk))
                done[choice.index] = choice
        finally:
            self.stream.close()
        return Completion(**self.head, choices=[done[i] for i in sorted(done)], usage=self._usage())

    async def events(self) -> AsyncGenerator[Event, None]:
        """The answer in pieces, one for each token that settles text where the client keeps up."""
        shell = {**self.head, "object": "text_completion"}
        try:
            async for chunk in self.stream:
                choice = await off_loop_if_long(self._choice, chunk, self._scored(chunk))
                if choice["text"] or choice["finish_reason"] or choice["token_ids"] or choice["logprobs"]:
                    yield {**shell, "choices": [choice]}
        finally:
            self.stream.close()
        if self.body.stream_options and self.body.stream_options.include_usage:
            yield Completion(**self.head, choices=[], usage=self._usage()).model_dump()

    def _index(self, chunk: StreamChunk) -> int:
        return self.stream.index_of[chunk.request_id] * (self.body.n or 1) + chunk.index

    def _scored(self, chunk: StreamChunk) -> int:
        """Tokens whose log-probabilities the chunk's answer holds, an echoed prompt's too."""
        state = self.choices[self._index(chunk)]
        return len(chunk.logprobs) + (0 if state.begun else len(state.prompt_logprobs))

    def _text_choice(self, chunk: StreamChunk) -> TextChoice:
        return TextChoice(**self._choice(chunk))

    def _choice(self, chunk: StreamChunk) -> dict[str, Any]:
        """The fields of a `TextChoice`, as JSON has them."""
        if chunk.metrics is not None:
            self.metrics.append(chunk.metrics)
        index = self._index(chunk)
        state = self.choices[index]
        text, token_ids, logprobs = chunk.text, chunk.token_ids, chunk.logprobs
        if self.silent:
            text, token_ids, logprobs = "", (), ()
        first, state.begun = not state.begun, True
        echoed = first and self.body.echo
        wants_ids = self.body.return_token_ids
        scores = None
        if self.body.logprobs is not None:
            entries = [*(state.prompt_logprobs if echoed else ()), *logprobs]
            scores = self._logprobs(state, entries, echoed).model_dump()
        return {
            "index": index,
            "text": state.prompt + text if echoed else text,
            "logprobs": scores,
            "finish_reason": chunk.finish_reason if chunk.finish_reason != "abort" else None,
            "stop_reason": named_stop(self.body, chunk),
            "token_ids": list(token_ids) if wants_ids else None,
            "prompt_token_ids": list(state.prompt_ids) if wants_ids and first else None,
        }

    def _logprobs(self, state: _Choice, entries: Sequence[TokenLogprobs], echoed: bool) -> TextLogprobs:
        told = TextLogprobs()
        if echoed:
            self._tell(state, told, state.prompt_ids[0], None, None)
        for entry in entries:
            top = {self.service.token_text(token): logprob for token, logprob in entry.top}
            top.setdefault(self.service.token_text(entry.token_id), entry.logprob)
            self._tell(state, told, entry.token_id, entry.logprob, top)
        return told

    def _tell(
        self,
        state: _Choice,
        told: TextLogprobs,
        token_id: int,
        logprob: float | None,
        top: dict[str, float] | None,
    ) -> None:
        text = self.service.token_text(token_id)
        told.text_offset.append(state.offset)
        told.tokens.append(text)
        told.token_logprobs.append(logprob)
        told.top_logprobs.append(top)
        state.offset += 0 if token_id in self.service.tokenizer.special_ids else len(text)

    def _usage(self) -> Usage:
        prompt = sum(metrics.prompt_tokens for metrics in self.metrics)
        written = 0 if self.silent else sum(metrics.output_tokens for metrics in self.metrics)
        cached = sum(metrics.cached_tokens for metrics in self.metrics)
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=written,
            total_tokens=prompt + written,
            prompt_tokens_details=PromptDetails(cached_tokens=cached),
        )


async def complete(service: Service, body: CompletionRequest, api_key: str | None) -> EventReply | JsonReply:
    """Queue the prompts, and answer in one piece or in many.

    Raises:
        ApiError: the body cannot be served, or there is no room; nothing was queued.
    """
    model = service.check_model(body.model)
    if body.best_of not in (None, body.n or 1):
        raise ApiError(400, "best_of: supported where it is n", param="best_of")
    if body.max_tokens == 0 and not body.echo:
        raise ApiError(400, "max_tokens: 0 needs echo", param="max_tokens")
    if service.bridge.engine.tokenizer is None:
        _check_plain(body)
    prompts = await _prompts(service, body)
    grammar = await service.grammar(body)
    max_tokens = 16 if body.max_tokens is None else max(1, body.max_tokens)
    params = service.params(
        body,
        max_tokens=max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
        grammar=grammar,
    )
    repeated = params.n * sum(map(len, prompts)) if body.echo or body.return_token_ids else 0
    if repeated > MAX_REPEATED:
        raise ApiError(400, f"n: repeats {repeated} prompt tokens; up to {MAX_REPEATED} in all", param="n")
    echoed = repeated if body.echo else 0
    service.check_logprobs(echoed + len(prompts) * params.n * max_tokens, body.logprobs)
    run = CompletionRun(service, body, model, await _echoes(service, body, prompts))
    streams = bool(body.stream)
    requests = [service.request(prompt, params, stream=streams, api_key=api_key) for prompt in prompts]
    run.begin(service.bridge.submit(requests))
    seconds = service.config.request_timeout_s
    return EventReply(run.events(), seconds) if streams else JsonReply(run.whole(), seconds)


def _check_plain(body: CompletionRequest) -> None:
    """Raise ApiError for what a model without a tokenizer cannot tell."""
    for name in ("echo", "logprobs", "response_format", "structured_outputs"):
        given = getattr(body, name)
        if given is not None and given is not False:
            raise ApiError(400, f"{name}: this model has no tokenizer", param=name)


async def _prompts(service: Service, body: CompletionRequest) -> list[list[int]]:
    """The prompts' token ids."""
    given = body.prompt
    if isinstance(given, str):
        prompts = [await service.encode(given, "prompt")]
    elif isinstance(given[0], int):
        prompts = [given]
    else:
        prompts = [
            await service.encode(prompt, f"prompt[{index}]") if isinstance(prompt, str) else prompt  # type: ignore[misc]
            for index, prompt in enumerate(given)
        ]
    for index, prompt in enumerate(prompts):
        service.check_length(len(prompt), "prompt" if len(prompts) == 1 else f"prompt[{index}]")
    return prompts


async def _echoes(service: Service, body: CompletionRequest, prompts: Sequence[Sequence[int]]) -> list[str]:
    """The prompts as text, where they are wanted back."""
    if not body.echo:
        return [""] * len(prompts)
    given: list[Any] = body.prompt if isinstance(body.prompt, list) else [body.prompt]
    return [
        text if isinstance(text, str) else await service.in_thread(service.tokenizer.decode, ids)
        for text, ids in zip(given, prompts, strict=False)  # one prompt of token ids has an entry for each
    ]
