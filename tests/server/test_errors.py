"""Errors in OpenAI's shape: the status, the field at fault, and nothing of the server's insides."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable

import openai
import pytest

from strobe.server.config import ServerConfig
from strobe.server.gate import Gate
from strobe.server.metrics import Metrics

from .conftest import LiveServer

CHAT = {"messages": [{"role": "user", "content": "O"}]}
DEEP: dict = {}
for _ in range(40):
    DEEP = {"properties": {"a": DEEP}}


def check(response, status: int, param: str | None) -> str:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code", "request_id"}
    assert error["param"] == param
    assert error["request_id"] == response.headers["x-request-id"]
    return error["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": ["a", 3]}, "prompt[1]"),
        ({"prompt": [1.5]}, "prompt[0]"),
        ({"prompt": [True]}, "prompt[0]"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": [2048]}, "prompt"),
        ({"prompt": [3, 1 << 40]}, "prompt[1]"),
        ({"prompt": [5] * 1024}, "prompt"),
        ({"prompt": ["O", "O " * 2000]}, "prompt[1]"),
        ({"prompt": ["O"] * 257}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"prompt": "O", "temperature": -0.1}, "temperature"),
        ({"prompt": "O", "temperature": "1"}, "temperature"),
        ({"prompt": "O", "top_p": 0}, "top_p"),
        ({"prompt": "O", "n": 0}, "n"),
        ({"prompt": "O", "n": 129}, "n"),
        ({"prompt": "O", "n": 100}, "n"),
        ({"prompt": "O", "n": True}, "n"),
        ({"prompt": "O", "logprobs": 21}, "logprobs"),
        ({"prompt": ["O"] * 200, "logprobs": 20, "max_tokens": 100}, "logprobs"),
        ({"prompt": [[5] * 1000] * 17, "n": 64, "echo": True}, "n"),
        ({"prompt": [[5] * 1000] * 17, "n": 64, "return_token_ids": True}, "n"),
        ({"prompt": [5] * 1000, "logprobs": 20, "max_tokens": 1, "echo": True, "n": 13}, "logprobs"),
        ({"prompt": "O", **{f"x{i}": i for i in range(200)}}, None),
        ({"prompt": "O", "logit_bias": {str(i): 1 for i in range(2000)}}, "logit_bias"),
        ({"prompt": "O", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "O", "max_tokens": 1025}, "max_tokens"),
        ({"prompt": "O", "max_tokens": 4, "min_tokens": 5}, "min_tokens"),
        ({"prompt": "O", "stop": ["a"] * 65}, "stop"),
        ({"prompt": "O", "stop": ""}, "stop"),
        ({"prompt": "O", "stop": ["a", "b" * 1025]}, "stop[1]"),
        ({"prompt": "O", "seed": 1 << 64}, "seed"),
        ({"prompt": "O", "logit_bias": {"a": 1}}, "logit_bias.a"),
        ({"prompt": "O", "logit_bias": {"9999": 1}}, "logit_bias"),
        ({"prompt": "O", "logit_bias": {"3": 101}}, "logit_bias.3"),
        ({"prompt": "O", "best_of": 3}, "best_of"),
        ({"prompt": "O", "suffix": "x"}, "suffix"),
        ({"prompt": "O", "temprature": 1}, "temprature"),
        ({"prompt": "O", "response_format": {"type": "xml"}}, "response_format.type"),
        ({"prompt": "O", "structured_outputs": {"regex": "a("}}, "structured_outputs.regex"),
        ({"prompt": "O", "structured_outputs": {"regex": "a" * 40000}}, "structured_outputs.regex"),
        ({"prompt": "O", "structured_outputs": {}}, "structured_outputs"),
        ({"prompt": "O", "structured_outputs": {"json": DEEP}}, "structured_outputs.json"),
        ({"prompt": "O", "structured_outputs": {"json": {"enum": ["a" * 40000]}}}, "structured_outputs.json"),
        ({"prompt": "O", "structured_outputs": {"json": {"type": "nope"}}}, "structured_outputs.json"),
        ({"prompt": "O", "structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"prompt": "O", "min_tokens": 3, "structured_outputs": {"choice": ["a"]}}, "min_tokens"),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_a_completion_that_cannot_be(idle: LiveServer, body, param) -> None:
    with idle.http() as client:
        response = client.post(
            "/v1/completions", content=json.dumps(body), headers={"content-type": "application/json"}
        )
    assert check(response, 400, param)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}, {"role": "wizard", "content": "x"}]}, "messages[1].role"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "name": "<|eos|>"}]}, "messages[0].name"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}
                ]
            },
            "messages[0].content[0].type",
        ),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "O " * 3000}]}, "messages"),
        ({**CHAT, "top_logprobs": 2}, "top_logprobs"),
        ({**CHAT, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({**CHAT, "max_tokens": 3, "max_completion_tokens": 3}, "max_tokens"),
        ({**CHAT, "tool_choice": "required"}, "tool_choice"),
        ({**CHAT, "tool_choice": {"type": "function"}}, "tool_choice.function"),
        ({**CHAT, "response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {**CHAT, "tools": [{"type": "function", "function": {"name": "no spaces"}}]},
            "tools[0].function.name",
        ),
        ({**CHAT, "chat_template": "{{ 7*7 }}"}, "chat_template"),
        ({**CHAT, "stream_options": {"foo": 1}}, "stream_options.foo"),
        ({**CHAT, "chat_template_kwargs": {"tools": []}}, "chat_template_kwargs"),
        ({**CHAT, "chat_template_kwargs": {"x": "y" * (33 << 10)}}, "chat_template_kwargs"),
        ({**CHAT, "chat_template_kwargs": [1]}, "chat_template_kwargs"),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_a_chat_that_cannot_be(idle: LiveServer, body, param) -> None:
    message = check(idle.post("/v1/chat/completions", body), 400, param)
    assert "strobe-tiny" not in message  # no path of the server's


def test_a_large_body_with_many_mistakes_is_refused_at_the_first(idle: LiveServer) -> None:
    """A list of a million wrong items must not make a million errors, each with a place of its own."""
    for prompt in ([1.5] * 300_000, ["a", 7] * 100_000, [[["a"]]] * 100_000, [[5.5] * 1000] * 250):
        response = idle.post("/v1/completions", {"prompt": prompt})
        assert check(response, 400, response.json()["error"]["param"])
        assert len(response.content) < 2000


def test_a_body_that_does_not_come_is_given_up(serve, monkeypatch) -> None:
    monkeypatch.setattr("strobe.server.gate.BODY_S", 0.3)
    server = serve()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as client:
        head = f"POST /tokenize HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        client.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        assert client.recv(4096).startswith(b"HTTP/1.1 408")
    server.settle()


def test_an_empty_prompt_is_bos_alone(idle: LiveServer) -> None:
    answer = idle.post("/v1/completions", {"prompt": ""}).json()
    assert answer["usage"]["prompt_tokens"] == 1


def test_what_is_no_body(idle: LiveServer) -> None:
    json_type = {"content-type": "application/json"}
    with idle.http() as client:

        def send(content: bytes | str, **headers: str):
            return client.post("/v1/completions", content=content, headers={**json_type, **headers})

        check(send(b"{"), 400, None)
        check(send(b""), 400, None)
        check(send(b"\xff\xfe{}"), 400, None)
        check(send(b"[" * 100_000), 400, None)
        check(send(b'{"prompt": "O", "seed": ' + b"9" * 5000 + b"}"), 400, None)
        check(send(b'{"prompt": "O", "temperature": NaN}'), 400, "temperature")
        check(send(b'["prompt"]'), 400, None)
        check(send(b'{"prompt": "O"}', **{"content-type": "text/plain"}), 415, None)
        check(client.post("/v1/completions", data={"prompt": "O"}), 415, None)
        check(send(b" " * (3 << 20)), 413, None)
        check(send(iter([b" " * (1 << 20)] * 3)), 413, None)  # without a content-length
        check(client.get("/v1/nothing"), 404, None)
        check(client.get("/v1/completions"), 405, None)
        check(client.delete("/v1/models"), 405, None)


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({}, None),
        ({"prompt": "O"}, "prompt"),
        ({"logprobs": 0}, "logprobs"),
        ({"echo": True}, "echo"),
        ({"stop": "a"}, "stop"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ],
    ids=str,
)
def test_a_model_without_a_tokenizer_takes_and_gives_ids(serve, monkeypatch, more, param) -> None:
    server = serve(ServerConfig())
    monkeypatch.setattr(server.engine, "tokenizer", None)
    monkeypatch.setattr(server.service.llm, "_tokenizer", None)
    body = {"prompt": [5, 6], "max_tokens": 2, "ignore_eos": True, "return_token_ids": True, **more}
    answer = server.post("/v1/completions", body)
    if param is None:
        assert len(answer.json()["choices"][0]["token_ids"]) == 2
    else:
        check(answer, 400, param)
    assert server.engine.stats().steps == (0 if param else 2), "refused before it is run"


def test_a_model_that_is_not_served(idle: LiveServer) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        idle.client().completions.create(model="gpt-17", prompt="O")
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"
    for path, body in (("/tokenize", {"prompt": "O"}), ("/detokenize", {"tokens": [3]})):
        check(idle.post(path, {**body, "model": "\n<script>"}), 404, "model")


def test_what_fails_inside_is_told_to_the_log_alone(serve, monkeypatch, caplog) -> None:
    server = serve()

    def fail(*args, **kwargs):
        raise ZeroDivisionError("secret words")

    monkeypatch.setattr(server.service.tokenizer, "encode", fail)
    for stream in (False, True):
        response = server.post("/v1/completions", {"prompt": "O", "stream": stream})
        assert "secret" not in check(response, 500, None)
    assert "secret words" in caplog.text
    assert response.headers["x-request-id"] in caplog.text


def test_tokenize_bounds(idle: LiveServer) -> None:
    check(idle.post("/tokenize", {}), 400, "prompt")
    check(idle.post("/tokenize", {"prompt": "O", **CHAT}), 400, "prompt")
    check(idle.post("/detokenize", {"tokens": [1 << 31]}), 400, "tokens[0]")
    assert idle.post("/detokenize", {"tokens": [2047, 5000, 2_000_000_000]}).status_code == 200


@pytest.mark.parametrize("begun", [False, True], ids=["no answer yet", "amid an answer"])
def test_who_is_cut_off_by_the_servers_end_is_told_so(begun: bool) -> None:
    sent: list[dict] = []

    async def send(message: dict) -> None:
        sent.append(message)

    async def app(scope: dict, receive: object, send: Callable) -> None:
        if begun:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        await asyncio.sleep(60)

    async def cut_off() -> None:
        gate = Gate(app, ServerConfig(api_keys=("k",)), Metrics("m"))
        headers = [(b"authorization", b"Bearer k")]
        scope = {"type": "http", "method": "GET", "path": "/version", "headers": headers}
        task = asyncio.create_task(gate(scope, None, send))
        await asyncio.sleep(0.01)
        task.cancel()
        await task

    asyncio.run(cut_off())
    if begun:
        assert [message["status"] for message in sent] == [200]
    else:
        assert (sent[0]["status"], json.loads(sent[1]["body"])["error"]["code"]) == (503, "stopping")
