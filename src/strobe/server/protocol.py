"""uvicorn's HTTP/1.1, with bounds on a request's head: its bytes, and the time that they take to arrive."""

from __future__ import annotations

import asyncio
import uuid
from http import HTTPStatus
from typing import Any

from httptools import HttpParserError
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from strobe.server.errors import ApiError
from strobe.server.replies import dump

MAX_HEAD_BYTES = 64 << 10
"""Bytes of a request's line and headers."""
HEAD_S = 30.0
"""Time that they get to arrive, from the connection or from the first of them."""
LINGER_S = 1.0
"""How long a refused client may go on sending: a connection closed on unread bytes would lose the answer."""


class BoundedProtocol(HttpToolsProtocol):
    """One connection. A head that is too large, too slow or no HTTP gets an error as others, and ends it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_head = True
        self._head_bytes = 0
        self._deadline: asyncio.TimerHandle | None = None
        self._refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if self._in_head:
            self._await_head()
            self._head_bytes += len(data)
        super().data_received(data)
        if self._in_head and self._head_bytes > MAX_HEAD_BYTES:
            self._refuse(_too_large())

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._await_head()

    def on_headers_complete(self) -> None:
        self._stop_waiting()
        self._in_head, self._head_bytes = False, 0
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > MAX_HEAD_BYTES:
            self._refuse(_too_large())
            raise HttpParserError("headers too large")  # stops the parser
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_head = True
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls where the parser has stopped."""
        self._refuse(ApiError(400, "this is no HTTP/1.1 request", code="invalid_http"))

    def _await_head(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(HEAD_S, self._expire)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _expire(self) -> None:
        self._deadline = None
        if self.cycle is not None and not self.cycle.response_complete:
            return  # the answer ahead goes on; what keeps an idle connection bounds the rest
        if self._head_bytes:
            self._refuse(
                ApiError(408, f"the headers did not arrive within {HEAD_S:g} s", code="head_timeout")
            )
        else:
            self.transport.close()

    def _refuse(self, error: ApiError) -> None:
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        self._stop_waiting()
        request_id = uuid.uuid4().hex
        body = dump(error.body(request_id))
        status = HTTPStatus(error.status_code)
        head = f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
        head += f"content-length: {len(body)}\r\nx-request-id: {request_id}\r\nconnection: close\r\n\r\n"
        self.transport.write(head.encode() + body)
        self.transport.write_eof()
        self.loop.call_later(LINGER_S, self.transport.close)


def _too_large() -> ApiError:
    return ApiError(431, f"the headers are larger than {MAX_HEAD_BYTES} bytes", code="headers_too_large")
