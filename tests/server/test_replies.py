"""How answers leave: their JSON, off the event loop where they are long, and to clients that do not read."""

from __future__ import annotations

import asyncio
import json
import socket
import time

import pytest

from strobe.server.answers import CalledFunction, CalledTool, ChatMessage
from strobe.server.chat import ChatRun
from strobe.server.completions import CompletionRun
from strobe.server.config import ServerConfig
from strobe.server.replies import dump

from .conftest import LiveServer, events_of

HALF = "\ud83d"


@pytest.mark.parametrize("arguments", ['{"to": "Mantua ☂"}', f'{{"to": "{HALF}"}}'])
def test_json_of_an_answer_is_utf8_whatever_a_model_wrote(arguments) -> None:
    message = ChatMessage(
        tool_calls=[CalledTool(id="1", function=CalledFunction(name="f", arguments=arguments))]
    )
    told = json.loads(dump(message).decode("utf-8"))
    assert told["tool_calls"][0]["function"]["arguments"] == arguments.replace(HALF, "?")
    assert told == {**message.model_dump(), "tool_calls": told["tool_calls"]}
    assert json.loads(dump({"text": arguments})) == {"text": arguments.replace(HALF, "?")}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "O"}], "logprobs": True}),
        ("/v1/completions", {"prompt": [9] * 20, "echo": True, "logprobs": 2}),
        ("/v1/completions", {"prompt": [9] * 20, "echo": True, "logprobs": 2, "stream": True}),
    ],
    ids=["chat", "completion", "stream"],
)
def test_many_logprobs_are_told_off_the_event_loop(serve, monkeypatch, path, body) -> None:
    server, loops = serve(), []
    body = {**body, "max_tokens": 3, "ignore_eos": True, "temperature": 0}
    expected = server.post(path, body)

    def note(told):
        def noted(*args):
            loops.append(asyncio._get_running_loop())
            return told(*args)

        return noted

    monkeypatch.setattr("strobe.server.replies.LONG", 3)
    monkeypatch.setattr(ChatRun, "_logprob", note(ChatRun._logprob))
    monkeypatch.setattr(CompletionRun, "_tell", note(CompletionRun._tell))
    answer = server.post(path, body)
    if "stream" in body:  # after the prompt's come those of a token at a time
        assert set(loops[:20]) == {None}
    else:
        assert answer.json()["choices"] == expected.json()["choices"]
        assert set(loops) == {None}


def test_a_client_that_does_not_read_is_let_go(serve, monkeypatch) -> None:
    monkeypatch.setattr("strobe.server.replies.READ_S", 0.5)
    server = serve(ServerConfig(request_timeout_s=1.0))
    server.uvicorn.servers[0].sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    body = json.dumps(
        {"prompt": "O", "n": 16, "max_tokens": 900, "ignore_eos": True, "stream": True}
    ).encode()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect((host, int(port)))
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        tasks = server.uvicorn.server_state.tasks
        end = time.monotonic() + 20
        while not tasks:
            assert time.monotonic() < end
            time.sleep(0.01)
        server.settle()  # the engine is done with it: nothing but its reader is left
        while tasks:
            assert time.monotonic() < end, "its answer waits for ever"
            time.sleep(0.01)


def test_an_answer_is_not_cut_while_it_is_read(idle: LiveServer, monkeypatch) -> None:
    monkeypatch.setattr("strobe.server.replies.READ_S", 0.0)
    body = {"prompt": "O", "max_tokens": 40, "ignore_eos": True, "stream": True}
    assert len(events_of(idle.post("/v1/completions", body))) >= 2
