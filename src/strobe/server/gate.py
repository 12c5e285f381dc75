"""What stands before every route: request ids, host names, keys, the body's size and kind, one log line.

Plain ASGI, so that a route's own view of its client is not wrapped away.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import logging
import re
import time
import uuid
from collections.abc import MutableMapping
from hashlib import blake2b
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from strobe.server.config import LOOPBACK_HOSTS, ServerConfig
from strobe.server.errors import ApiError, internal, stopping
from strobe.server.metrics import Metrics
from strobe.server.replies import error_reply

_log = logging.getLogger(__name__)

BODY_S = 30.0
"""Time that a body gets to arrive."""
OPEN_ROUTES = ("/health",)
_GIVEN_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


class Gate:
    """Lets a request in, or answers it; gives every answer its id and counts it."""

    def __init__(self, app: ASGIApp, config: ServerConfig, metrics: Metrics) -> None:
        self.app = app
        self.config = config
        self.metrics = metrics
        self._keys = {_digest(key): key for key in config.api_keys}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        scope["request_id"] = given if _GIVEN_ID.fullmatch(given) else uuid.uuid4().hex
        status = 0

        async def tell(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = scope["request_id"]
            await send(message)

        begun = time.monotonic()
        try:
            self._check(scope, headers)
            await self.app(scope, _Body(receive, self.config.max_body_bytes), tell)
        except ApiError as error:
            await error_reply(error, scope)(scope, receive, tell)
        except Exception:
            _log.exception("request %s failed", scope["request_id"])
            if not status:
                await error_reply(internal(), scope)(scope, receive, tell)
        except asyncio.CancelledError:  # the server stops, and gives nobody more time
            if not status:
                await error_reply(stopping(), scope)(scope, receive, tell)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            self.metrics.http.labels(route, str(status or 499)).inc()
            told = (scope["request_id"], scope["method"], route, status or 499)
            _log.info("%s %s %s %d %.1f ms", *told, 1e3 * (time.monotonic() - begun))

    def _check(self, scope: Scope, headers: Headers) -> None:
        """Raise ApiError for a request that is not let in."""
        self._check_host(headers)
        if scope["path"] not in OPEN_ROUTES and self._keys:
            scope["api_key"] = self._key(headers.get("authorization", ""), page=scope["path"] == "/")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self.config.max_body_bytes:
            raise _too_large(self.config.max_body_bytes)
        if length == "0" and "transfer-encoding" not in headers:
            return
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            # a form of another site can send any kind but this one without being asked for leave
            raise ApiError(415, "the body must be application/json", code="unsupported_media_type")

    def _check_host(self, headers: Headers) -> None:
        """On loopback without keys a page of another site could come in by a name that it points here."""
        if self._keys or not self.config.on_loopback:
            return
        name = headers.get("host", "").lower()
        name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
        if name not in (*LOOPBACK_HOSTS, *self.config.allowed_hosts):
            raise ApiError(403, "this server does not answer to that host name", code="unknown_host")

    def _key(self, authorization: str, *, page: bool) -> str:
        """The key that a client brings: as a bearer token, or as a browser's password."""
        kind, _, value = authorization.partition(" ")
        value = value.strip()
        if kind.lower() == "basic":
            value = _password(value)
        digest, found = _digest(value), None
        for known, key in self._keys.items():  # all of them, always: the time must not tell
            if hmac.compare_digest(digest, known):
                found = key
        if found is None:
            error = ApiError(401, "no valid API key", code="invalid_api_key")
            error.headers = {"www-authenticate": 'Basic realm="strobe"' if page else "Bearer"}
            raise error
        return found


class _Body:
    """`receive` that bounds the body's size, and the time it takes to arrive."""

    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive = receive
        self._limit = limit
        self._seen = 0
        self._whole = False
        self._end = time.monotonic() + BODY_S

    async def __call__(self) -> MutableMapping[str, Any]:
        if self._whole:
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), max(0.0, self._end - time.monotonic()))
        except asyncio.TimeoutError:
            raise ApiError(408, f"the body did not arrive within {BODY_S:g} s", code="body_timeout") from None
        self._seen += len(message.get("body", b""))
        if self._seen > self._limit:
            raise _too_large(self._limit)
        self._whole = not message.get("more_body", False)
        return message


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body is larger than {limit} bytes")


def _digest(key: str) -> bytes:
    return blake2b(key.encode("utf-8", "replace")).digest()


def _password(value: str) -> str:
    try:
        return base64.b64decode(value, validate=True).decode("utf-8", "replace").partition(":")[2]
    except (binascii.Error, ValueError):
        return ""
