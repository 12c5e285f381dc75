"""Tool calls: forced ones are always whole, free ones are found in what the model wrote."""

from __future__ import annotations

import json

import pytest

from strobe.checkpoints.chat import ChatTemplate
from strobe.server.chat import message_of
from strobe.server.schema import ChatRequest, Message
from strobe.server.tools import ToolReader, mode_of

from .conftest import LiveServer, events_of

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "stab",
            "description": "Stab someone.",
            "parameters": {
                "type": "object",
                "properties": {"whom": {"enum": ["Tybalt", "Mercutio"]}, "times": {"$ref": "#/$defs/few"}},
                "$defs": {"few": {"type": "integer", "minimum": 1, "maximum": 9}},
                "required": ["whom", "times"],
                "additionalProperties": False,
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "flee",
            "parameters": {
                "type": "object",
                "properties": {"to": {"enum": ["Mantua", "Verona"]}},
                "required": ["to"],
                "additionalProperties": False,
            },
        },
    },
]
MESSAGES = [{"role": "user", "content": "What now?"}]


def check_call(name: str, arguments: str) -> None:
    told = json.loads(arguments)
    if name == "stab":
        assert told["whom"] in ("Tybalt", "Mercutio")
        assert 1 <= told["times"] <= 9
    else:
        assert name == "flee"
        assert told["to"] in ("Mantua", "Verona")


@pytest.mark.parametrize("parallel", [None, False])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "flee"}}], ids=str)
def test_a_forced_call(idle: LiveServer, choice, parallel) -> None:
    extra = {} if parallel is None else {"parallel_tool_calls": parallel}
    asked = {
        "model": "strobe-tiny",
        "messages": MESSAGES,
        "tools": TOOLS,
        "tool_choice": choice,
        "seed": 9,
        "max_tokens": 900,
        **extra,
    }
    (told,) = idle.client().chat.completions.create(**asked).choices
    assert told.finish_reason == "tool_calls"
    assert told.message.content is None
    calls = told.message.tool_calls
    assert len({call.id for call in calls}) == len(calls) >= 1
    assert parallel is None or len(calls) == 1
    for call in calls:
        check_call(call.function.name, call.function.arguments)
        assert choice == "required" or call.function.name == "flee"
    streamed: dict[int, list[str]] = {}
    for chunk in idle.client().chat.completions.create(**asked, stream=True):
        for delta in chunk.choices[0].delta.tool_calls or ():
            entry = streamed.setdefault(delta.index, ["", ""])
            entry[0] += delta.function.name or ""
            entry[1] += delta.function.arguments or ""
        reason = chunk.choices[0].finish_reason
    assert reason == "tool_calls"
    assert list(streamed.values()) == [[call.function.name, call.function.arguments] for call in calls]


def test_free_and_forbidden_tools_answer_in_text(idle: LiveServer) -> None:
    for choice in ("auto", "none", None):
        answer = idle.client().chat.completions.create(
            model="strobe-tiny",
            messages=MESSAGES,
            tools=TOOLS,
            max_tokens=20,
            seed=1,
            **({"tool_choice": choice} if choice else {}),
        )
        assert answer.choices[0].message.content
        assert answer.choices[0].message.tool_calls is None


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_is_cut_off_says_so(idle: LiveServer, stream) -> None:
    body = {"messages": MESSAGES, "tools": TOOLS, "max_tokens": 2, "stream": stream}
    body["tool_choice"] = {"type": "function", "function": {"name": "flee"}}
    answer = idle.post("/v1/chat/completions", body)
    choices = [event["choices"][0] for event in (events_of(answer) if stream else [answer.json()])]
    assert choices[-1]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ('{"to": "Mantua", "ways": [1, null]}', '{"to": "Mantua", "ways": [1, null]}'),
        ("", "{}"),
        ("{broken", '"{broken"'),
        ("[1]", '"[1]"'),
    ],
)
def test_templates_are_given_a_calls_arguments_as_an_object(arguments, shown) -> None:
    """Templates write them with `tojson`, as Llama 3.1's and Qwen 2.5's do: a text would be quoted twice."""
    call = {"id": "call_1", "type": "function", "function": {"name": "flee", "arguments": arguments}}
    message = message_of(Message.model_validate({"role": "assistant", "content": None, "tool_calls": [call]}))
    template = ChatTemplate("{{ messages[0].tool_calls[0].function.arguments | tojson }}")
    assert template.render([message], {}) == shown


def read(text: str, cut: int, **more) -> tuple[str, list[tuple[str, dict]], str]:
    """What a reader makes of a text that comes in pieces of `cut` characters."""
    body = ChatRequest.model_validate({"messages": MESSAGES, "tools": TOOLS, **more})
    reader = ToolReader(body, mode_of(body))
    early = "".join(reader.push(text[i : i + cut]) for i in range(0, len(text), cut))
    rest, calls = reader.finish()
    return early + rest, [(call.function.name, json.loads(call.function.arguments)) for call in calls], early


HERMES = '<tool_call>\n{"name": "flee", "arguments": {"to": "Mantua"}}\n</tool_call>'


@pytest.mark.parametrize("cut", [1, 3, 7, 1000])
@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("I go.", "I go.", []),
        (HERMES, "", [("flee", {"to": "Mantua"})]),
        ("I go.\n" + HERMES, "I go.", [("flee", {"to": "Mantua"})]),
        (HERMES * 2, "", [("flee", {"to": "Mantua"})] * 2),
        ('{"name": "flee", "parameters": {"to": "X"}}', "", [("flee", {"to": "X"})]),
        ("<tool_call>{", "<tool_call>{", []),
        ('<tool_call>{"name": "sing", "arguments": {}}</tool_call>', None, []),
        ('{"name": "flee"}', '{"name": "flee"}', []),
        ('{"a": 1} and so on', '{"a": 1} and so on', []),
        ("a < b <tool", "a < b <tool", []),
        ("  ", "  ", []),
        ("[" * 5000, "[" * 5000, []),
        ("{" * 5000, "{" * 5000, []),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_reading_what_a_model_wrote(text, content, calls, cut) -> None:
    told, found, _ = read(text, cut)
    assert found == calls
    assert told.strip() == (text if content is None else content).strip()


def test_text_is_shown_as_it_comes_until_a_call_may_begin() -> None:
    assert read("Speak on, and then <tool", 1)[2] == "Speak on, and then "
    assert read("Speak", 1, tool_choice="none")[2] == "Speak"
    assert read(HERMES * 3, 5, parallel_tool_calls=False)[1] == [("flee", {"to": "Mantua"})]


def test_two_schemas_of_one_name_are_refused(idle: LiveServer) -> None:
    other = json.loads(json.dumps(TOOLS[0]))
    other["function"]["name"] = "wound"
    other["function"]["parameters"]["$defs"]["few"]["maximum"] = 3
    body = {"messages": MESSAGES, "tools": [TOOLS[0], other], "tool_choice": "required"}
    response = idle.post("/v1/chat/completions", body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "tools")
    body["tools"] = [TOOLS[0], TOOLS[0]]
    assert idle.post("/v1/chat/completions", body).json()["error"]["param"] == "tools"
