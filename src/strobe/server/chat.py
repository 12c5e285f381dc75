"""/v1/chat/completions."""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from strobe.engine.request import Metrics, StreamChunk, TokenLogprobs
from strobe.server.answers import (
    CalledTool,
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatMessage,
    Finish,
    PromptDetails,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from strobe.server.bridge import Stream
from strobe.server.errors import ApiError
from strobe.server.replies import Event, EventReply, JsonReply, off_loop_if_long
from strobe.server.schema import ChatRequest, Message, ToolCall
from strobe.server.service import Service, named_stop
from strobe.server.tools import Mode, ToolReader, for_template, mode_of, schema_of


class ChatRun:
    """One call of /v1/chat/completions, once its conversation is in the queue."""

    def __init__(self, service: Service, body: ChatRequest, model: str, mode: Mode) -> None:
        self.service = service
        self.body = body
        self.head: dict[str, Any] = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        self._spelled: dict[int, dict[str, Any]] = {}
        """Tokens as log-probabilities tell of them."""
        self.readers = [ToolReader(body, mode) for _ in range(body.n or 1)]
        self.metrics: Metrics | None = None

    def begin(self, stream: Stream) -> None:
        self.stream = stream

    async def whole(self) -> ChatCompletion:
        """The answer in one piece."""
        choices: dict[int, ChatChoice] = {}
        try:
            async for chunk in self.stream:
                self.metrics = chunk.metrics or self.metrics
                choices[chunk.index] = await off_loop_if_long(self._choice, chunk, len(chunk.logprobs))
        finally:
            self.stream.close()
        wants_ids = self.body.return_token_ids
        return ChatCompletion(
            **self.head,
            choices=[choices[index] for index in sorted(choices)],
            usage=self._usage(),
            prompt_token_ids=list(self.stream.requests[0].prompt_token_ids) if wants_ids else None,
        )

    async def events(self) -> AsyncGenerator[Event, None]:
        """The answer in pieces: the role, text, calls, and why it ended."""
        begun: set[int] = set()
        try:
            async for chunk in self.stream:
                self.metrics = chunk.metrics or self.metrics
                if chunk.index not in begun:
                    begun.add(chunk.index)
                    yield self._event(chunk.index, {"role": "assistant", "content": ""})
                for delta in await off_loop_if_long(self._deltas, chunk, len(chunk.logprobs)):
                    yield delta
        finally:
            self.stream.close()
        if self.body.stream_options and self.body.stream_options.include_usage:
            yield {**self._shell(), "choices": [], "usage": self._usage().model_dump()}

    def _deltas(self, chunk: StreamChunk) -> list[Event]:
        reader = self.readers[chunk.index]
        events: list[Event] = []
        calls: list[CalledTool] = []
        text = reader.push(chunk.text)
        if chunk.finish_reason is not None:
            rest, calls = reader.finish()
            text += rest
        more: dict[str, Any] = {"token_ids": list(chunk.token_ids)} if self.body.return_token_ids else {}
        logprobs = self._logprobs(chunk.logprobs)
        if text or logprobs is not None or more:
            told = logprobs.model_dump() if logprobs is not None else None
            events.append(self._event(chunk.index, {"content": text} if text else {}, logprobs=told, **more))
        for index, call in enumerate(calls):
            delta = {"tool_calls": [{"index": index, **call.model_dump()}]}
            events.append(self._event(chunk.index, delta))
        if chunk.finish_reason is not None:
            why = {"finish_reason": _reason(chunk, calls), "stop_reason": named_stop(self.body, chunk)}
            events.append(self._event(chunk.index, {}, **why))
        return events

    def _shell(self) -> dict[str, Any]:
        return {**self.head, "object": "chat.completion.chunk"}

    def _event(self, index: int, delta: dict[str, Any], **more: Any) -> Event:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **more}
        return {**self._shell(), "choices": [choice]}

    def _choice(self, chunk: StreamChunk) -> ChatChoice:
        reader = self.readers[chunk.index]
        text = reader.push(chunk.text)
        rest, calls = reader.finish()
        text += rest
        return ChatChoice(
            index=chunk.index,
            message=ChatMessage(content=text or None if calls else text, tool_calls=calls or None),
            logprobs=self._logprobs(chunk.logprobs),
            finish_reason=_reason(chunk, calls),
            stop_reason=named_stop(self.body, chunk),
            token_ids=list(chunk.token_ids) if self.body.return_token_ids else None,
        )

    def _logprobs(self, entries: Sequence[TokenLogprobs]) -> ChatLogprobs | None:
        if not self.body.logprobs:
            return None
        return ChatLogprobs(content=[self._logprob(entry) for entry in entries])

    def _logprob(self, entry: TokenLogprobs) -> TokenLogprob:
        top = [TopLogprob(**self._token(token, logprob)) for token, logprob in entry.top]
        return TokenLogprob(**self._token(entry.token_id, entry.logprob), top_logprobs=top)

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        spelled = self._spelled.get(token_id)
        if spelled is None:
            data = self.service.tokenizer.token_bytes(token_id)
            spelled = self._spelled[token_id] = {
                "token": data.decode("utf-8", "replace"),
                "bytes": list(data),
            }
        return {**spelled, "logprob": logprob}

    def _usage(self) -> Usage:
        metrics = self.metrics
        prompt, written, cached = (
            (metrics.prompt_tokens, metrics.output_tokens, metrics.cached_tokens) if metrics else (0, 0, 0)
        )
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=written,
            total_tokens=prompt + written,
            prompt_tokens_details=PromptDetails(cached_tokens=cached),
        )


async def chat(service: Service, body: ChatRequest, api_key: str | None) -> EventReply | JsonReply:
    """Queue the conversation, and answer in one piece or in many.

    Raises:
        ApiError: the body cannot be served, or there is no room; nothing was queued.
    """
    model = service.check_model(body.model)
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs: needs logprobs", param="top_logprobs")
    if body.max_tokens == 0:
        raise ApiError(400, "max_tokens: 0; supported: 1 or more", param="max_tokens")
    if None not in (body.max_tokens, body.max_completion_tokens):
        raise ApiError(400, "max_tokens: max_completion_tokens is given too", param="max_tokens")
    mode = mode_of(body)
    tools = for_template(body.tools) if mode != "none" else None
    messages = [message_of(message) for message in body.messages]
    text = await service.render(messages, tools=tools, variables=body.chat_template_kwargs)
    prompt = await service.encode(text, "messages", special=False)
    service.check_length(len(prompt), "messages")
    grammar = await service.grammar(body)
    if mode in ("required", "named"):
        if grammar is not None:
            raise ApiError(400, "tool_choice: the output's format is given too", param="tool_choice")
        grammar = await service.grammars.json_schema(schema_of(body), "tools", compact=True)
    max_tokens = body.max_completion_tokens or body.max_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    if max_tokens is None:
        max_tokens = service.longest(len(prompt), body.n or 1, logprobs)
    params = service.params(body, max_tokens=max_tokens, logprobs=logprobs, grammar=grammar)
    service.check_logprobs(params.n * max_tokens, logprobs)
    run = ChatRun(service, body, model, mode)
    streams = bool(body.stream)
    request = service.request(prompt, params, stream=streams, api_key=api_key)
    run.begin(service.bridge.submit([request]))
    seconds = service.config.request_timeout_s
    return EventReply(run.events(), seconds) if streams else JsonReply(run.whole(), seconds)


def message_of(message: Message) -> dict[str, Any]:
    """A message as chat templates expect it: text content, and the roles that they know."""
    content = message.content
    if isinstance(content, list):
        content = "\n".join(part.text for part in content)
    told: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
    told["content"] = content or ""
    if message.name is not None:
        told["name"] = message.name
    if message.tool_calls is not None:
        told["tool_calls"] = [_call_of(call) for call in message.tool_calls]
    if message.tool_call_id is not None:
        told["tool_call_id"] = message.tool_call_id
    return told


def _call_of(call: ToolCall) -> dict[str, Any]:
    """A call as chat templates expect it: its arguments are an object, where the client's text is one."""
    told = call.model_dump()
    with contextlib.suppress(ValueError, RecursionError):
        arguments = json.loads(call.function.arguments or "{}")
        if isinstance(arguments, dict):
            told["function"]["arguments"] = arguments
    return told


def _reason(chunk: StreamChunk, calls: Sequence[CalledTool]) -> Finish:
    """Why a choice ended; one that was cut off says so, since its last call may not be whole."""
    if chunk.finish_reason == "length":
        return "length"
    return "tool_calls" if calls else "stop"
