"""Answers that stop their work when the client goes away, streaming or not."""

from __future__ import annotations

import json
import logging
from abc import abstractmethod
from collections.abc import AsyncGenerator, Coroutine, Mapping
from contextlib import aclosing
from typing import Any

import anyio
from pydantic import BaseModel
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from strobe.server.errors import ApiError, internal

_log = logging.getLogger(__name__)

Event = Mapping[str, Any]


_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def dump(value: Any) -> bytes:
    """JSON in UTF-8. Half a surrogate pair, which a client may have sent, becomes "?"."""
    if isinstance(value, BaseModel):
        value = value.model_dump()
    return _JSON.encode(value).encode("utf-8", "replace")


class Json(JSONResponse):
    def render(self, content: Any) -> bytes:
        return dump(content)


def error_reply(error: ApiError, scope: Scope) -> Response:
    return Json(error.body(scope.get("request_id")), error.status_code, dict(error.headers or {}))


class _Reply(Response):
    """Runs `_answer` while the client is there; its going away cancels it."""

    def __init__(self) -> None:
        super().__init__()
        self.started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
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

    def __init__(self, work: Coroutine[Any, Any, BaseModel]) -> None:
        super().__init__()
        self.work = work

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = await self.work
        body = await anyio.to_thread.run_sync(dump, answer)
        await Response(body, media_type="application/json")(scope, receive, send)


class EventReply(_Reply):
    """Server-sent events, ended by [DONE].

    The status is not sent before the first event is there, so that a request that fails until then
    is answered with the status of its error.
    """

    def __init__(self, events: AsyncGenerator[Event, None]) -> None:
        super().__init__()
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
