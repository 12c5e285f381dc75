"""Constrained output: whatever the model would like to say, what it says fits."""

from __future__ import annotations

import json
import re
import time

import pytest
from pydantic import BaseModel

from strobe.server.config import ServerConfig

from .conftest import LiveServer, events_of

CHAT = {"messages": [{"role": "user", "content": "O Romeo"}], "max_tokens": 200}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "house": {"enum": ["Montague", "Capulet"]},
        "friends": {"type": "array", "items": {"$ref": "#/$defs/friend"}, "maxItems": 2},
    },
    "$defs": {
        "friend": {
            "type": "object",
            "properties": {"loyal": {"type": "boolean"}},
            "required": ["loyal"],
            "additionalProperties": False,
        }
    },
    "required": ["name", "age", "house", "friends"],
    "additionalProperties": False,
}


def check_person(value: object) -> None:
    assert isinstance(value, dict)
    assert set(value) == {"name", "age", "house", "friends"}
    assert len(value["name"]) <= 12
    assert type(value["age"]) is int
    assert 0 <= value["age"] <= 99
    assert value["house"] in ("Montague", "Capulet")
    assert all(type(friend["loyal"]) is bool for friend in value["friends"])


@pytest.mark.parametrize("temperature", [0, 1, 2])
def test_json_of_a_schema(idle: LiveServer, temperature) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    answer = idle.client().chat.completions.create(
        model="strobe-tiny",
        messages=CHAT["messages"],
        temperature=temperature,
        n=4,
        seed=6,
        max_tokens=300,
        response_format=form,
    )
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        check_person(json.loads(choice.message.content))


def test_the_clients_own_parser(idle: LiveServer) -> None:
    class Verdict(BaseModel):
        guilty: bool
        years: int

    answer = idle.client().chat.completions.parse(
        model="strobe-tiny", messages=CHAT["messages"], response_format=Verdict, max_tokens=60
    )
    assert isinstance(answer.choices[0].message.parsed, Verdict)


def test_any_json_object(idle: LiveServer) -> None:
    for seed in range(6):
        body = {**CHAT, "seed": seed, "response_format": {"type": "json_object"}, "temperature": 1}
        choice = idle.post("/v1/chat/completions", body).json()["choices"][0]
        assert choice["message"]["content"].lstrip().startswith("{")
        if choice["finish_reason"] == "stop":
            assert isinstance(json.loads(choice["message"]["content"]), dict)


@pytest.mark.parametrize(
    "pattern", [r"[a-f]{3}-[0-9]{2,4}", r"(yes|no)( indeed)?!", "Thou [a-z]{1,9} ☂+é/\\\\"]
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_regex(idle: LiveServer, pattern, stream) -> None:
    body = {
        "prompt": "O",
        "structured_outputs": {"regex": pattern},
        "max_tokens": 90,
        "n": 3,
        "stream": stream,
    }
    response = idle.post("/v1/completions", body)
    texts = ["", "", ""]
    for answer in events_of(response) if stream else [response.json()]:
        for choice in answer["choices"]:
            texts[choice["index"]] += choice["text"]
    for text in texts:
        assert re.fullmatch(pattern, text)


def test_a_choice(idle: LiveServer) -> None:
    choices = ["to be", "not to be", 'a (b) [c]* \n "d" | ☂']
    seen = set()
    for seed in range(12):
        body = {
            "prompt": "O",
            "structured_outputs": {"choice": choices},
            "seed": seed,
            "temperature": 2,
            "max_tokens": 40,
        }
        choice = idle.post("/v1/completions", body).json()["choices"][0]
        assert choice["finish_reason"] == "stop"
        seen.add(choice["text"])
    assert seen <= set(choices)
    assert len(seen) > 1


def test_a_schema_alone_and_among_free_requests(idle: LiveServer) -> None:
    """A constrained request and a free one in one batch do not touch each other."""
    import concurrent.futures

    free = {"prompt": "JULIET:\n", "max_tokens": 40, "seed": 2}
    bound = {**CHAT, "max_tokens": 300, "structured_outputs": {"json": PERSON}}
    alone = idle.post("/v1/completions", free).json()["choices"][0]["text"]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        texts = [pool.submit(idle.post, "/v1/completions", free) for _ in range(4)]
        people = [pool.submit(idle.post, "/v1/chat/completions", bound) for _ in range(4)]
    assert {future.result().json()["choices"][0]["text"] for future in texts} == {alone}
    for future in people:
        check_person(json.loads(future.result().json()["choices"][0]["message"]["content"]))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"a": {"$ref": "http://169.254.169.254/x"}}},
        {"$ref": "file:///etc/passwd"},
        {"$ref": "#/nowhere"},
        {"type": ["nope"]},
        {"type": "string", "pattern": "("},
        {"anyOf": []},
        {"not": {"type": "string"}},
    ],
    ids=repr,
)
def test_a_schema_that_cannot_be_kept_to(idle: LiveServer, schema) -> None:
    body = {
        **CHAT,
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}},
    }
    response = idle.post("/v1/chat/completions", body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["code"]) == ("response_format", "invalid_grammar")
    assert "/root" not in error["message"]


@pytest.mark.parametrize(
    "hostile",
    [
        {"regex": "(a{1,1000}){1,1000}b{1,1000}"},
        {"regex": "(" * 400 + "a" + ")*" * 400},
        {"regex": "|".join("a" * i for i in range(150))},
        {"regex": r"[\s\S]*(.*a){25}"},
        {
            "json": {
                "anyOf": [{"type": "object", "properties": {f"p{i}": {"type": "number"}}} for i in range(500)]
            }
        },
        {"json": {"type": "array", "minItems": 100_000, "items": {"type": "integer"}}},
        {"json": {"type": "string", "minLength": 1_000_000}},
        {
            "json": {
                "properties": {f"k{i}": {"pattern": "(a|b|ab)*c{1,99}"} for i in range(300)},
                "minProperties": 299,
            }
        },
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_hostile_grammar_costs_little(serve, hostile) -> None:
    """It is refused, given up, or kept to until max_tokens; others are served meanwhile."""
    server = serve()
    begun = time.monotonic()
    body = {"prompt": "O", "structured_outputs": hostile, "max_tokens": 4}
    assert server.post("/v1/completions", body).status_code in (200, 400)
    assert time.monotonic() - begun < 10
    assert server.post("/v1/completions", {"prompt": "O", "max_tokens": 2}).status_code == 200
    server.settle()


@pytest.mark.parametrize("stream", [False, True])
def test_a_grammar_that_is_outgrown_is_the_clients_own_fault(idle: LiveServer, stream) -> None:
    """It compiles, and then needs more work a token than is given to it."""
    wide = [{"type": "object", "properties": {f"p{i}": {"type": "number"}}} for i in range(400)]
    body = {
        "prompt": "O",
        "structured_outputs": {"json": {"anyOf": wide}},
        "max_tokens": 20,
        "stream": stream,
    }
    response = idle.post("/v1/completions", body)
    assert "grammar_too_complex" in response.text
    assert response.status_code == (200 if response.text.startswith("data:") else 400)


def test_a_compiler_that_takes_too_long_is_400(serve, monkeypatch) -> None:
    monkeypatch.setattr("strobe.server.grammars.COMPILE_S", 0.05)
    server = serve(ServerConfig())
    compile_, slow = server.service.grammars._compile, time.sleep
    monkeypatch.setattr(server.service.grammars, "_compile", lambda *a: (slow(0.5), compile_(*a))[1])
    response = server.post("/v1/completions", {"prompt": "O", "structured_outputs": {"regex": "a"}})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "grammar_timeout"


def test_grammars_are_kept_and_forgotten(serve, monkeypatch) -> None:
    monkeypatch.setattr("strobe.server.grammars.CACHED", 2)
    server = serve()
    for pattern in ("a", "b", "a", "c", "a"):
        answer = server.post("/v1/completions", {"prompt": "O", "structured_outputs": {"regex": pattern}})
        assert answer.json()["choices"][0]["text"] == pattern
        assert len(server.service.grammars._kept) <= 2


@pytest.mark.parametrize(
    ("regex", "told"),
    [
        ("(a", "structured_outputs.regex: unclosed group"),
        ("(?=a)b", "structured_outputs.regex: look-around, including look-ahead"),
        (".*" * 1000, "structured_outputs.regex: too complex to compile"),
    ],
    ids=["open", "look-ahead", "too complex"],
)
def test_a_regexs_fault_is_named(idle: LiveServer, regex: str, told: str) -> None:
    body = {"prompt": "O", "structured_outputs": {"regex": regex}}
    assert idle.post("/v1/completions", body).json()["error"]["message"].startswith(told)
