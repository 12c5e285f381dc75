"""A request's head over a plain socket: what is too large, too slow or no HTTP is answered and ended."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator

import pytest

from strobe.server import protocol

from .conftest import LiveServer


@pytest.fixture
def connection(idle: LiveServer) -> Iterator[socket.socket]:
    host, port = idle.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as opened:
        yield opened


def to_the_end(connection: socket.socket) -> bytes:
    """What the server says until it ends the connection."""
    said = b""
    while part := connection.recv(1 << 16):
        said += part
    return said


def refusal(said: bytes) -> tuple[int, dict]:
    head, _, body = said.partition(b"\r\n\r\n")
    assert b"connection: close" in head
    assert b"x-request-id: " in head
    return int(head.split()[1]), json.loads(body)["error"]


@pytest.mark.parametrize(
    "parts",
    [
        [b"GET /health HTTP/1.1\r\nX: ", b"a" * 300_000],
        [b"GET /", b"a" * 300_000],
        [b"GET /health HTTP/1.1\r\n", *[b"X%d: a\r\n" % n for n in range(40_000)]],
        [b"GET /health HTTP/1.1\r\nX: ", b"a" * protocol.MAX_HEAD_BYTES, b"\r\n\r\n"],
    ],
    ids=["a header without end", "a path without end", "headers without end", "a whole head"],
)
def test_a_head_too_large(connection: socket.socket, parts: list[bytes]) -> None:
    connection.sendall(b"".join(parts))
    status, error = refusal(to_the_end(connection))
    assert (status, error["code"]) == (431, "headers_too_large")


def test_a_large_head_within_the_bound_and_the_next_one(connection: socket.socket) -> None:
    padding = b"X: " + b"a" * (protocol.MAX_HEAD_BYTES - 1000)
    for _ in range(2):  # the count begins anew with each request
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + padding + b"\r\n\r\n")
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")


def test_a_body_larger_than_the_heads_bound(connection: socket.socket, idle: LiveServer) -> None:
    body = json.dumps({"prompt": "a " * 50_000}).encode()
    head = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
    connection.sendall(head)
    for start in range(0, len(body), 30_000):
        connection.sendall(body[start : start + 30_000])
    assert to_the_end(connection).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("said", [b"\x16\x03\x01\x00", b"garbage\r\n\r\n"], ids=["TLS", "garbage"])
def test_no_http(connection: socket.socket, said: bytes) -> None:
    connection.sendall(said)
    status, error = refusal(to_the_end(connection))
    assert (status, error["code"]) == (400, "invalid_http")


@pytest.mark.parametrize(
    ("sent", "status"), [(b"", None), (b"GET /hea", 408), (b"GET /health HTTP/1.1\r\nX", 408)]
)
def test_a_head_too_slow(
    idle: LiveServer, monkeypatch: pytest.MonkeyPatch, sent: bytes, status: int | None
) -> None:
    monkeypatch.setattr(protocol, "HEAD_S", 0.2)
    host, port = idle.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as opened:
        opened.sendall(sent)
        said = to_the_end(opened)
    assert (refusal(said)[0] if said else None) == status


def test_a_head_too_slow_after_an_answer(connection: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEAD_S", 0.2)
    connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")
    connection.sendall(b"GET /hea")
    assert refusal(to_the_end(connection))[0] == 408


def test_an_answer_outlives_the_next_ones_head(
    connection: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "HEAD_S", 0.05)
    body = json.dumps({"prompt": "O", "max_tokens": 400, "ignore_eos": True, "stream": True}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body + b"GET /hea")
    said, end = b"", time.monotonic() + 20
    while b"[DONE]" not in said:
        assert time.monotonic() < end
        part = connection.recv(1 << 16)
        assert part, said[-300:]
        said += part
    assert b"HTTP/1.1 408" not in said
