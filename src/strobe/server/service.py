"""What every route stands on: the model, its engine's thread, and the way from a body to a request."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import blake2b
from typing import Any, TypeVar

from strobe.checkpoints.tokenizer import Tokenizer
from strobe.engine.llm import LLM
from strobe.engine.request import Request, StreamChunk
from strobe.engine.sampling_params import SamplingParams
from strobe.errors import RequestError, StrobeError
from strobe.server.bridge import EngineBridge
from strobe.server.config import ServerConfig
from strobe.server.errors import ApiError, from_strobe
from strobe.server.grammars import Grammars, LlgGrammar
from strobe.server.metrics import Metrics
from strobe.server.schema import Sampling

_log = logging.getLogger(__name__)

Result = TypeVar("Result")

MAX_LOGPROB_ENTRIES = 1 << 18
"""Log-probabilities in one answer."""

_TAKEN_AS_GIVEN = """
    temperature top_p top_k min_p presence_penalty frequency_penalty repetition_penalty
    n seed stop stop_token_ids ignore_eos min_tokens
""".split()


class Service:
    """One model being served. `start` and `stop` frame its life on the event loop."""

    def __init__(self, llm: LLM, config: ServerConfig) -> None:
        self.llm = llm
        self.config = config
        self.names = config.served_names or (llm.name,)
        self.created = int(time.time())
        self.metrics = Metrics(self.names[0])
        self.bridge = EngineBridge(llm.engine, config, self.metrics)
        self.metrics.watch(llm.engine.stats, llm.engine.max_model_len)
        self._threads = ThreadPoolExecutor(2, "strobe-text")
        self._grammars: Grammars | None = None
        self._lag: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._lag = asyncio.create_task(self.metrics.watch_loop())
        await self.bridge.start()

    async def stop(self) -> None:
        if self._lag is not None:
            self._lag.cancel()
        await self.bridge.stop()
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self._grammars is not None:
            self._grammars.close()

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises ApiError where the model has none."""
        try:
            return self.llm.tokenizer
        except RequestError:
            raise ApiError(
                400, "this model has no tokenizer: give token ids to /v1/completions", param="prompt"
            ) from None

    @property
    def grammars(self) -> Grammars:
        if self._grammars is None:
            model = self.llm.engine.model.config
            self._grammars = Grammars(self.tokenizer, model.vocab_size, model.eos_token_ids)
        return self._grammars

    def check_model(self, name: str | None) -> str:
        """The model's name, as answers give it. Raises ApiError for a model that is not served."""
        if name is not None and name not in self.names:
            raise ApiError(
                404, f"no such model; served: {', '.join(self.names)}", param="model", code="model_not_found"
            )
        return name or self.names[0]

    async def in_thread(self, function: Callable[..., Result], /, *args: Any, **kwargs: Any) -> Result:
        """Work on a text off the event loop, where the queue has room for what comes of it."""
        self.bridge.check_room()
        self.bridge.preparing += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, lambda: function(*args, **kwargs))
        finally:
            self.bridge.preparing -= 1

    async def encode(self, text: str, param: str, *, special: bool = True) -> list[int]:
        """Token ids of a client's text. Raises ApiError 400 for one that is no Unicode."""
        try:
            return await self.in_thread(self.tokenizer.encode, text, special)
        except StrobeError as error:
            raise from_strobe(error, param) from error

    async def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """A conversation as text, by the checkpoint's own template, which sees `variables` too.

        Raises:
            ApiError: 400 where there is no template, or it refuses. Its own words stay in the log.
        """
        tokenizer = self.tokenizer
        if tokenizer.chat_template is None:
            raise ApiError(400, "this model brings no chat template: use /v1/completions", param="messages")
        try:
            return await self.in_thread(
                tokenizer.apply_chat_template,
                messages,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                **(variables or {}),
            )
        except StrobeError as error:
            _log.info("%s", error)
            raise ApiError(
                400, "messages: the model's chat template refuses them", param="messages", code="template"
            ) from error

    async def grammar(self, body: Sampling) -> LlgGrammar | None:
        """What `response_format` or `structured_outputs` ask for, compiled."""
        form, wanted = body.response_format, body.structured_outputs
        if form is not None and form.type != "text":
            if wanted is not None:
                raise ApiError(
                    400, "structured_outputs: response_format is given too", param="structured_outputs"
                )
            schema: dict[str, Any] = {"type": "object"}
            if form.type == "json_schema":
                if form.json_schema is None or form.json_schema.schema_ is None:
                    where = "response_format.json_schema"
                    raise ApiError(400, f"{where}: a schema is required", param=where)
                schema = form.json_schema.schema_
            return await self.grammars.json_schema(schema, "response_format")
        if wanted is None:
            return None
        given = [value for value in (wanted.json_schema, wanted.regex, wanted.choice) if value is not None]
        if len(given) != 1:
            raise ApiError(
                400, "structured_outputs: give one of json, regex, choice", param="structured_outputs"
            )
        if wanted.json_schema is not None:
            return await self.grammars.json_schema(wanted.json_schema, "structured_outputs.json")
        if wanted.regex is not None:
            return await self.grammars.regex(wanted.regex, "structured_outputs.regex")
        return await self.grammars.choice(wanted.choice or (), "structured_outputs.choice")

    def params(self, body: Sampling, **more: Any) -> SamplingParams:
        """The body's sampling over the model's own defaults. Raises ApiError where fields contradict."""
        given = {name: value for name in _TAKEN_AS_GIVEN if (value := getattr(body, name)) is not None}
        bias = {int(token): value for token, value in (body.logit_bias or {}).items()}
        try:
            return replace(self.llm.default_params, **given, logit_bias=bias, **more)
        except StrobeError as error:
            raise from_strobe(error) from error

    def request(
        self, prompt: Sequence[int], params: SamplingParams, *, stream: bool, api_key: str | None
    ) -> Request:
        """A request for the engine; clients with different keys share no cached prefix."""
        salt = b"" if api_key is None else blake2b(api_key.encode(), digest_size=16).digest()
        request = Request(uuid.uuid4().hex, tuple(prompt), params, stream=stream, cache_salt=salt)
        if self.config.log_prompts:
            decoder = self.bridge.engine.tokenizer
            _log.info("%s prompt %r", request.request_id, decoder.decode(prompt) if decoder else prompt)
        return request

    def check_length(self, tokens: int, param: str) -> None:
        """Raise ApiError where a prompt leaves no room for an answer."""
        context = self.llm.engine.max_model_len
        if tokens == 0:
            raise ApiError(400, f"{param}: empty; a prompt needs one token at least", param=param)
        if tokens >= context:
            raise ApiError(
                400,
                f"{param}: {tokens} tokens; this model's context is {context}, output included",
                param=param,
                code="context_length_exceeded",
            )

    def longest(self, prompt: int, n: int, top: int | None) -> int:
        """Tokens of an answer whose length nobody gave: what the context holds, and logprobs may tell of."""
        context = self.llm.engine.max_model_len - prompt
        return context if top is None else min(context, MAX_LOGPROB_ENTRIES // (n * (top + 1)))

    def check_logprobs(self, tokens: int, top: int | None) -> None:
        """Raise ApiError where an answer would hold more log-probabilities than a client can want."""
        if top is not None and tokens * (top + 1) > MAX_LOGPROB_ENTRIES:
            raise ApiError(
                400,
                f"logprobs: up to {tokens} tokens with {top + 1} each; up to {MAX_LOGPROB_ENTRIES} in all",
                param="logprobs",
            )

    def token_text(self, token_id: int) -> str:
        """One token as text; a piece of a character as U+FFFD."""
        return self.tokenizer.token_bytes(token_id).decode("utf-8", "replace")


def named_stop(body: Sampling, chunk: StreamChunk) -> str | int | None:
    """What of `stop` and `stop_token_ids` ended an output; None where the model ended it by itself."""
    reason = chunk.stop_reason
    return reason if isinstance(reason, str) or reason in (body.stop_token_ids or ()) else None
