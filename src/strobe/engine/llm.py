"""`LLM`: a checkpoint with an engine around it."""

from __future__ import annotations

import itertools
import logging
import operator
import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import Any

from strobe.checkpoints.load import load
from strobe.checkpoints.tokenizer import Tokenizer
from strobe.engine.config import EngineConfig
from strobe.engine.engine import Engine
from strobe.engine.request import Request, RequestOutput, StreamChunk
from strobe.engine.sampling_params import SamplingParams
from strobe.errors import CheckpointError, OutOfPagesError, RequestError, SettingsError, StrobeError

Prompt = str | Sequence[int]

_log = logging.getLogger(__name__)


class LLM:
    """Text from a model.

        with LLM() as llm:
            print(llm.generate("ROMEO:", SamplingParams(max_tokens=64))[0].text)

    Args:
        model: a Hugging Face folder, a Meta folder, a llama2.c .bin file or a hub name; None for the
            bundled model.
        device: "auto", "cpu", "cuda" or "cuda:N".
        dtype: "auto", "float32", "bfloat16" or "float16".
        config: sizes and kernels of the engine.
        progress: told of (bytes in place, bytes in all) while the weights are copied.

    One thread at a time may use it. Where `params` are left out, the checkpoint's own defaults hold.

    Raises:
        CheckpointError, DeviceError, SettingsError: the model or the engine cannot be had.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        device: str = "auto",
        dtype: str = "auto",
        config: EngineConfig | None = None,
        progress: Callable[[int, int], object] | None = None,
    ) -> None:
        if not isinstance(config, EngineConfig | None):
            raise SettingsError(f"config is a {type(config).__name__}; supported: EngineConfig")
        begun = time.perf_counter()
        checkpoint = load(model, device=device, dtype=dtype, progress=progress)
        loaded = time.perf_counter()
        self.name = checkpoint.name
        self.path = checkpoint.path
        self.config = config or EngineConfig()
        self._tokenizer = checkpoint.tokenizer
        self._engine: Engine | None = Engine(checkpoint.model, checkpoint.tokenizer, self.config)
        self.startup = {"checkpoint": loaded - begun, "engine": time.perf_counter() - loaded}
        """Seconds: to have the network and the tokenizer, and the engine with its cache. What a device does
        meanwhile is not waited for."""
        _log.info("%s", self._engine.memory)
        _log.info("started in %s", ", ".join(f"{name} {s:.2f} s" for name, s in self.startup.items()))
        given = {f.name: getattr(checkpoint.defaults, f.name) for f in fields(checkpoint.defaults)}
        try:
            self.default_params = SamplingParams(**{name: v for name, v in given.items() if v is not None})
        except RequestError as error:
            raise CheckpointError(f"{self.path}: generation_config.json: {error}") from error
        self._ids = map(str, itertools.count())
        self._mail: dict[str, deque[StreamChunk]] = {}

    @property
    def engine(self) -> Engine:
        if self._engine is None:
            raise StrobeError("this LLM is closed")
        return self._engine

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises RequestError where the checkpoint brings none: such a model takes and gives token ids."""
        if self._tokenizer is None:
            raise RequestError(f"{self.name} has no tokenizer", hint="give token ids")
        return self._tokenizer

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_finish: Callable[[RequestOutput], object] | None = None,
    ) -> list[RequestOutput]:
        """Outputs in the prompts' order, all run together; `on_finish` is told of each as it ends.

        Raises:
            RequestError, OutOfPagesError: a prompt that cannot be served; then none is run.
        """
        each: list[Any] = [prompts] if isinstance(prompts, str) else _list("prompts", prompts)
        if each and isinstance(each[0], int):
            raise RequestError(
                "prompts is a list of numbers", hint="put each prompt's token ids in a list: [[1, 2]]"
            )
        single = isinstance(params, SamplingParams | None)
        wanted = (
            [params] * len(each) if single else _list("params", params, "SamplingParams, or a list of them")
        )
        if len(wanted) != len(each):
            raise RequestError(
                f"{len(each)} prompts and {len(wanted)} sampling params; supported: one for all, or one each"
            )
        requests = [self._request(prompt, p) for prompt, p in zip(each, wanted, strict=True)]
        self._check_all(requests)
        live = {request.request_id: request for request in requests}
        try:
            for request in requests:
                self.engine.add(request)
            while live:
                for chunk in self._step():
                    if chunk.metrics is not None and chunk.request_id in live:
                        ended = live.pop(chunk.request_id)
                        if on_finish is not None:
                            on_finish(ended.output())
        finally:
            self._drop(live)
        return [request.output() for request in requests]

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None
    ) -> Generator[StreamChunk, None, None]:
        """A chunk for every token; the last has the metrics. Closing the iterator drops the request.

        Raises:
            RequestError, OutOfPagesError: at once, before the first chunk.
            StrobeError: later, where a step failed or was interrupted that the request was part of.
        """
        request = self._request(prompt, params, stream=True)
        self.engine.check(request)
        return self._chunks(request)

    def chat(
        self, messages: Sequence[Mapping[str, Any]], params: SamplingParams | None = None
    ) -> RequestOutput:
        """The answer to a conversation of `{"role": ..., "content": ...}`, through the chat template.

        Raises:
            RequestError: also where the checkpoint brings no template.
        """
        return self.generate([self._conversation(messages)], params)[0]

    def stream_chat(
        self, messages: Sequence[Mapping[str, Any]], params: SamplingParams | None = None
    ) -> Generator[StreamChunk, None, None]:
        """As `chat`, in chunks."""
        return self.stream(self._conversation(messages), params)

    def close(self) -> None:
        """Free the weights and the cache; requests still running are lost."""
        self._engine = None

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _conversation(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        supported = 'a list of {"role": ..., "content": ...}'
        for message in _list("messages", messages, supported):
            if not isinstance(message, Mapping) or "role" not in message:
                raise RequestError(f"messages holds {message!r:.60}; supported: {supported}")
        return self.tokenizer.encode(self.tokenizer.apply_chat_template(messages), add_special=False)

    def _request(self, prompt: Prompt, params: SamplingParams | None, *, stream: bool = False) -> Request:
        if not isinstance(params, SamplingParams | None):
            raise RequestError(f"params is a {type(params).__name__}; supported: SamplingParams")
        tokens = self.tokenizer.encode(prompt) if isinstance(prompt, str) else _list("a prompt", prompt)
        try:
            ids = tuple(map(operator.index, tokens))
        except TypeError:
            raise RequestError(
                "a prompt holds what is no token id; supported: str, or a list of int"
            ) from None
        return Request(next(self._ids), ids, params or self.default_params, stream=stream)

    def _check_all(self, requests: Sequence[Request]) -> None:
        """Raise what `engine.check` does, with the number of the prompt where there are several."""
        fine = 0
        try:
            for request in requests:
                self.engine.check(request)
                fine += 1
        except (RequestError, OutOfPagesError) as error:
            if len(requests) == 1:
                raise
            which = f"prompt {fine + 1} of {len(requests)}"
            raise type(error)(f"{which}: {error.message}", hint=error.hint) from None

    def _step(self) -> list[StreamChunk]:
        """One step for all requests; chunks of those that stream are kept for their own iterators.

        Requests that were part of a step that fails, or that Ctrl-C cuts off, are lost: what it was to write
        to their pages may not be there.
        """
        try:
            chunks = self.engine.step()
        except BaseException:
            self.engine.drop_running()
            raise
        for chunk in chunks:
            if chunk.request_id in self._mail:
                self._mail[chunk.request_id].append(chunk)
        return chunks

    def _chunks(self, request: Request) -> Generator[StreamChunk, None, None]:
        mail = self._mail.setdefault(request.request_id, deque())
        self.engine.add(request)
        chunk = None
        try:
            while chunk is None or chunk.metrics is None:
                while not mail:
                    if request.finished:
                        raise StrobeError("the request is lost: a step that it was part of was cut off")
                    self._step()
                chunk = mail.popleft()
                yield chunk
        finally:
            del self._mail[request.request_id]
            if not request.finished:
                self._drop([request.request_id])

    def _drop(self, request_ids: Collection[str]) -> None:
        """Abort requests, and take the step that frees their pages."""
        if self._engine is None or not request_ids:
            return
        for request_id in request_ids:
            self._engine.abort(request_id)
        self._step()


def _list(name: str, values: Any, supported: str = "str, or a list") -> list[Any]:
    if not isinstance(values, Iterable) or isinstance(values, (bytes, Mapping)):
        raise RequestError(f"{name} is a {type(values).__name__}; supported: {supported}")
    return list(values)
