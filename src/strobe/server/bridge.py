"""The engine's thread, and the event loop's side of it.

The loop hands requests over with `submit`, which never waits, and reads each one's chunks from its
`Stream`. The thread steps the engine, and posts what a step gave to the loop in one call. Both need the
interpreter: after a delivery the loop is left alone for as long as that took, and what the engine says
meanwhile goes in one chunk.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from strobe.engine.request import Request, StreamChunk
from strobe.errors import StrobeError
from strobe.server.config import ServerConfig
from strobe.server.errors import ApiError, from_strobe, internal, stopping, too_complex
from strobe.server.metrics import Metrics

if TYPE_CHECKING:
    from strobe.engine.engine import Engine

_log = logging.getLogger(__name__)

IDLE_S = 1.0
"""How often an idle thread shows that it lives."""
STALL_S = 60.0
"""A step that takes longer counts as a dead engine."""
EXPIRY_S = 0.25
"""How often timeouts are looked for."""
MAX_FAILURES = 3
"""Steps that may fail in a row."""


class Stream:
    """The chunks of some requests that belong together, for one reader on the event loop.

    It ends with the last chunk of the last of them. `close` drops what still runs.
    """

    def __init__(self, bridge: EngineBridge, requests: Sequence[Request]) -> None:
        self.requests = tuple(requests)
        self.index_of = {request.request_id: index for index, request in enumerate(requests)}
        self._bridge = bridge
        self._mail: dict[tuple[str, int], list[StreamChunk]] = {}
        self._error: ApiError | None = None
        self._came = asyncio.Event()
        self._unfinished = len(requests)

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> StreamChunk:
        """What one of the sequences has gained since it was last told.

        Raises ApiError where a request timed out or the engine failed.
        """
        if not self._unfinished and not self._mail:
            raise StopAsyncIteration
        if self._came.is_set():
            await asyncio.sleep(0)  # news of many sequences must not keep the event loop from others
        await self._came.wait()
        if not self._mail and self._error is not None:
            self.close()
            raise self._error
        chunk = StreamChunk.joined(self._mail.pop(next(iter(self._mail))))
        if not self._mail and self._error is None:
            self._came.clear()
        self._unfinished -= chunk.metrics is not None
        return chunk

    def put(self, chunk: StreamChunk) -> None:
        self._mail.setdefault((chunk.request_id, chunk.index), []).append(chunk)
        self._came.set()

    def fail(self, error: ApiError) -> None:
        """End with `error`, once what came before it is read."""
        self._error = self._error or error
        self._came.set()

    def close(self) -> None:
        """Leave; pages are free within a step. Nothing happens where the requests are over."""
        self._unfinished = 0
        self._mail.clear()
        for request_id in self.index_of:
            self._bridge.drop(request_id)


@dataclass(eq=False)
class _Live:
    """A request that is not over, and who reads it."""

    request: Request
    stream: Stream
    told_at: dict[int, float] = field(default_factory=dict)
    """When each sequence's last tokens were delivered, where the request streams."""


class EngineBridge:
    """Runs `engine` in a thread of its own, from `start` to `stop`. All else is called on the event loop."""

    def __init__(self, engine: Engine, config: ServerConfig, metrics: Metrics) -> None:
        self.engine = engine
        self.config = config
        self.metrics = metrics
        self._live: dict[str, _Live] = {}
        self.preparing = 0
        """Requests whose text is being worked on, to be submitted next."""
        self._wake = threading.Event()
        self._stopping = False
        self._failed = False
        self._beat = time.monotonic()
        self._next_delivery = 0.0
        """When the event loop may have more to do; never, while it is at the last delivery."""
        self._thread = threading.Thread(target=self._run, name="strobe-engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._expiry: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._expiry = self._loop.create_task(self._expire())
        self._thread.start()

    async def stop(self) -> None:
        """Drop what still runs and end the thread after the step it is in."""
        if self._expiry is not None:
            self._expiry.cancel()
        for live in list(self._live.values()):
            self._fail(live, stopping())
        await asyncio.to_thread(self.end)

    def end(self) -> None:
        """End the thread after the step it is in: an interpreter that ends under a step aborts."""
        self._stopping = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(STALL_S)

    @property
    def healthy(self) -> bool:
        """True only while the engine's thread steps, or would."""
        alive = self._thread.is_alive() and not self._failed and not self._stopping
        return alive and time.monotonic() - self._beat < STALL_S

    @property
    def waiting(self) -> list[Request]:
        """Requests that no step has taken up yet."""
        return [live.request for live in self._live.values() if live.request.started is None]

    def check_room(self, requests: int = 1, tokens: int = 0) -> None:
        """Raise ApiError where the engine is down (503), or its queue has no room for so much more (429).

        Those that the next step has a seat for do not count as queued.
        """
        if not self.healthy:
            raise ApiError(503, "the engine is not running", code="engine_down", retry_after_s=10)
        config, waiting = self.config, self.waiting
        queued = sum(len(request.prompt_token_ids) for request in waiting)
        seats = max(0, self.engine.config.max_num_seqs - (len(self._live) - len(waiting)))
        if requests > config.max_queue or tokens > config.max_queued_tokens:
            raise ApiError(
                400,
                f"prompt: {requests} prompts of {tokens} tokens in all; the queue holds "
                f"{config.max_queue} prompts and {config.max_queued_tokens} tokens",
                param="prompt",
            )
        ahead = len(waiting) + self.preparing
        if ahead + requests > config.max_queue + seats or queued + tokens > config.max_queued_tokens:
            self.metrics.rejected.inc()
            raise ApiError(
                429,
                f"the queue is full: {ahead} requests wait, with {queued} tokens",
                retry_after_s=min(30.0, self.metrics.recent_queue_s),
            )

    def submit(self, requests: Sequence[Request]) -> Stream:
        """Queue requests, all or none.

        Raises:
            ApiError: 400 for one that cannot be served, 429 where the queue is full, 503 without an engine.
        """
        self.check_room(len(requests), sum(len(request.prompt_token_ids) for request in requests))
        try:
            for request in requests:
                self.engine.check(request)
            for request in requests:
                self.engine.add(request)
        except StrobeError as error:
            raise from_strobe(error) from error
        stream = Stream(self, requests)
        self._live |= {request.request_id: _Live(request, stream) for request in requests}
        self._wake.set()
        return stream

    def drop(self, request_id: str) -> None:
        """Abort a request whose reader has gone."""
        if self._live.pop(request_id, None) is not None:
            self.engine.abort(request_id)
            self.metrics.ended("abort")

    def _run(self) -> None:
        failures = 0
        told: list[StreamChunk] = []
        while not self._stopping:
            self._beat = now = time.monotonic()
            self._wake.clear()
            if told and (now >= self._next_delivery or not self.engine.has_work):
                self._next_delivery = math.inf
                self._call(self._deliver, told)
                told = []
            if not self.engine.has_work:
                self._wake.wait(IDLE_S)
                continue
            try:
                told += self.engine.step()
            except Exception:
                failures += 1
                _log.exception("a step of the engine failed")
                self._call(self._deliver, told)
                told = []
                if not self._recover() or failures >= MAX_FAILURES:
                    self._failed = True
                    self._post_failure(None)
                    return
                continue
            failures = 0

    def _recover(self) -> bool:
        """Fail the requests of the step that failed; False where the engine cannot go on."""
        try:
            self._post_failure(self.engine.drop_running())
            self.engine.scheduler.check()
        except Exception:
            _log.exception("the engine cannot go on")
            return False
        return True

    def _post_failure(self, request_ids: list[str] | None) -> None:
        self._call(self._fail_all, request_ids)

    def _call(self, function: Callable[..., None], *args: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
            if self._loop is not None:
                self._loop.call_soon_threadsafe(function, *args)

    def _deliver(self, chunks: Sequence[StreamChunk]) -> None:
        now = time.monotonic()
        asyncio.get_running_loop().call_soon(self._delivered, now)  # behind the readers that wake now
        gained: Counter[tuple[_Live, int]] = Counter()
        for chunk in chunks:
            live = self._live.get(chunk.request_id)
            if live is None:
                continue
            if chunk.finish_reason == "abort":
                outgrown = any(s.matcher is not None and s.matcher.failed for s in live.request.sequences)
                self._fail(live, too_complex() if outgrown else internal())
                continue
            if live.request.stream:
                gained[live, chunk.index] += len(chunk.token_ids)
            if chunk.metrics is not None:
                del self._live[chunk.request_id]
                self.metrics.observe(chunk.metrics, chunk.finish_reason or "abort")
            live.stream.put(chunk)
        for (live, index), tokens in gained.items():
            gap = now - live.told_at.get(index, math.inf)
            for _ in range(tokens if gap >= 0 else 0):
                self.metrics.inter_token.observe(gap / tokens)
            live.told_at[index] = now

    def _delivered(self, begun: float) -> None:
        now = time.monotonic()
        self._next_delivery = now + (now - begun)

    def _fail_all(self, request_ids: Sequence[str] | None) -> None:
        for request_id in list(self._live) if request_ids is None else request_ids:
            if (live := self._live.get(request_id)) is not None:
                self._fail(live, internal())

    def _fail(self, live: _Live, error: ApiError) -> None:
        """Tell the reader, and make the engine forget the request."""
        if self._live.pop(live.request.request_id, None) is not None:
            live.stream.fail(error)
            self.engine.abort(live.request.request_id)
            self.metrics.ended("error")

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(EXPIRY_S)
            now = time.monotonic()
            for live in list(self._live.values()):
                age, waits = now - live.request.arrival, live.request.started is None
                if waits and age > self.config.queue_timeout_s:
                    message = f"no room within {self.config.queue_timeout_s:g} s"
                    self._fail(live, ApiError(503, message, code="queue_timeout", retry_after_s=10))
                elif age > self.config.request_timeout_s:
                    message = f"not done within {self.config.request_timeout_s:g} s"
                    self._fail(live, ApiError(504, message, code="request_timeout"))
