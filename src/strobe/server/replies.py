"""Answers that stop their work when the client goes away, streaming or not."""

from __future__ import annotations

import json
import logging
from abc import abstractmethod
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing, suppress
from typing import Any, TypeVar

import anyio
from pydantic import BaseModel
from pydantic_core import PydanticSerializationError
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from strobe.engine.request import StreamChunk
from strobe.server.errors import ApiError, internal

_log = logging.getLogger(__name__)

Event = Mapping[str, Any]
Made = TypeVar("Made")

READ_S = 60.0
"""Time that a client gets to read an answer, over what the answer itself may take."""
LONG = 256
"""Tokens whose log-probabilities take milliseconds to tell, which the event loop does not have."""
_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def dump(value: Any) -> bytes:
    """JSON in UTF-8. Half a surrogate pair, which a client may have sent, becomes "?"."""
    if isinstance(value, BaseModel):
        with suppress(PydanticSerializationError):  # half a surrogate pair
            return value.model_dump_json().encode()
        value = value.model_dump()
    return _JSON.encode(value).encode("utf-8", "replace")


async def off_loop_if_long(make: Callable[[StreamChunk], Made], chunk: StreamChunk, scored: int) -> Made:
    """`make(chunk)`, which tells the log-probabilities of so many tokens."""
    return make(chunk) if scored < LONG else await anyio.to_thread.run_sync(make, chunk)


class Json(JSONResponse):
    def render(self, content: Any) -> bytes:
        return dump(content)


def error_reply(error: ApiError, scope: Scope) -> Response:
    return Json(error.body(scope.get("request_id")), error.status_code, dict(error.headers or {}))


class _Reply(Response):
    """Runs `_answer` while the client is there; its going away cancels it.

    So does an end of its patience: `seconds` for the answer, and `READ_S` to read it. A client that reads
    nothing would keep what was written for it as long as it likes.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with anyio.move_on_after(self.seconds + READ_S) as patience:
            await self._while_there(scope, receive, send)
        if patience.cancelled_caught:
            _log.warning("request %s: its client does not read the answer", scope.get("request_id"))

    async def _while_there(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with anyio.create_task_group() as group:

            async def leave() -> None:
                while (await receive())["type"] != "http.disconnect":
                    pass
                group.cancel_scope.cancel()

            group.start_soon(leave)
            try:
                await self._answer(scope, receive, send)
            except ApiError as error:
                await self._fail(error, scope, receive, send)
            except OSError:  # the client went away while it was written to
                pass
            except Exception:
                _log.exception("request %s failed", scope.get("request_id"))
                await self._fail(internal(), scope, receive, send)
            group.cancel_scope.cancel()

    @abstractmethod
    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer; `started` is set with its first bytes."""

    async def _fail(self, error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        if not self.started:
            await error_reply(error, scope)(scope, receive, send)
            return
        data = b"data: " + dump(error.body(scope.get("request_id"))) + b"\n\n"
        await send({"type": "http.response.body", "body": data})


class JsonReply(_Reply):
    """One JSON document, once `work` has it."""

    def __init__(self, work: Coroutine[Any, Any, BaseModel], seconds: float) -> None:
        super().__init__(seconds)
        self.work = work

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = await self.work
        body = await anyio.to_thread.run_sync(dump, answer)
        self.started = True
        await Response(body, media_type="application/json")(scope, receive, send)


class EventReply(_Reply):
    """Server-sent events, ended by [DONE].

    The status is not sent before the first event is there, so that a request that fails until then
    is answered with the status of its error.
    """

    def __init__(self, events: AsyncGenerator[Event, None], seconds: float) -> None:
        super().__init__(seconds)
        self.events = events

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self.events) as events:
            async for event in events:
                if not self.started:
                    await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
                    self.started = True
                body = b"data: " + dump(event) + b"\n\n"
                await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold events back
]
