"""Tool calls: the grammar that brings a model to make one, and finding those in what it wrote.

With `tool_choice` "required" or a name the output is constrained, so that it is a call whatever the
model was trained on. With "auto" the model speaks as its template taught it, and two spellings are
known: <tool_call>{...}</tool_call> (Hermes, Qwen) and a bare JSON object (Llama 3).
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from strobe.server.answers import CalledFunction, CalledTool
from strobe.server.errors import ApiError
from strobe.server.schema import ChatRequest, NamedTool, Tool

OPEN, CLOSE = "<tool_call>", "</tool_call>"
MAX_CALLS = 16

Mode = Literal["none", "auto", "required", "named"]


def mode_of(body: ChatRequest) -> Mode:
    """How tools are to be used. Raises ApiError for a choice that fits no tool."""
    names = [tool.function.name for tool in body.tools or ()]
    if len(set(names)) != len(names):
        raise ApiError(400, "tools: two functions have one name", param="tools")
    choice = body.tool_choice
    if not names:
        if choice not in (None, "none"):
            raise ApiError(400, "tool_choice: given without tools", param="tool_choice")
        return "none"
    if isinstance(choice, NamedTool):
        if choice.function.name not in names:
            raise ApiError(400, "tool_choice: names no function of tools", param="tool_choice")
        return "named"
    return choice or "auto"


def schema_of(body: ChatRequest) -> dict[str, Any]:
    """What the output must be: one function's arguments, or a list of calls."""
    tools = body.tools or []
    if isinstance(body.tool_choice, NamedTool):
        wanted = body.tool_choice.function.name
        return next(_parameters(tool) for tool in tools if tool.function.name == wanted)
    shared: dict[str, Any] = {}
    calls = []
    for tool in tools:
        parameters = dict(_parameters(tool))
        for where in ("$defs", "definitions"):
            for name, schema in parameters.pop(where, {}).items():
                if shared.setdefault(where, {}).setdefault(name, schema) != schema:
                    raise ApiError(400, f"tools: two schemas are called {where}/{name[:80]}", param="tools")
        properties = {"name": {"const": tool.function.name}, "arguments": parameters}
        calls.append(_object(properties))
    most = 1 if body.parallel_tool_calls is False else MAX_CALLS
    return {"type": "array", "items": {"anyOf": calls}, "minItems": 1, "maxItems": most, **shared}


def _parameters(tool: Tool) -> dict[str, Any]:
    return tool.function.parameters or {"type": "object"}


def _object(properties: Mapping[str, Any]) -> dict[str, Any]:
    required = list(properties)
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


class ToolReader:
    """Parts one output's text into what the client is shown and the calls in it."""

    def __init__(self, body: ChatRequest, mode: Mode) -> None:
        self._mode = mode
        self._names = {tool.function.name for tool in body.tools or ()}
        self._named = body.tool_choice.function.name if isinstance(body.tool_choice, NamedTool) else ""
        self._most = 1 if body.parallel_tool_calls is False else MAX_CALLS
        self._held = ""
        self._shown = False

    def push(self, text: str) -> str:
        """What can be shown already: text that belongs to no call."""
        if self._mode == "none":
            return text
        self._held += text
        if self._mode != "auto" or OPEN in self._held:
            return ""
        begun = self._held.lstrip()
        if not self._shown and (not begun or begun[0] == "{"):
            return ""
        keep = next((n for n in range(len(OPEN) - 1, 0, -1) if self._held.endswith(OPEN[:n])), 0)
        end = len(self._held) - keep
        text, self._held = self._held[:end], self._held[end:]
        self._shown = self._shown or bool(text)
        return text

    def finish(self) -> tuple[str, list[CalledTool]]:
        """The rest of the text, and the calls. Text that is no whole call is shown as it stands."""
        held, self._held = self._held, ""
        if self._mode == "named":
            calls = [_call(self._named, held)]
        elif self._mode == "required":
            calls = self._listed(held)
        else:
            before, calls = self._found(held)
            return (before, calls) if calls else (held, [])
        return ("", calls) if calls else (held, [])

    def _listed(self, text: str) -> list[CalledTool]:
        value = _json(text)
        items = value if isinstance(value, list) else []
        return [call for item in items if (call := self._read(item)) is not None]

    def _found(self, text: str) -> tuple[str, list[CalledTool]]:
        """Calls in a text that the model was free to write, and what stands before them."""
        if self._mode == "none":
            return text, []
        before, mark, rest = text.partition(OPEN)
        parts = [part.partition(CLOSE)[0] for part in rest.split(OPEN)] if mark else [text]
        calls = [call for part in parts if (call := self._read(_json(part))) is not None]
        return ("" if not mark else before.rstrip()), calls[: self._most]

    def _read(self, value: Any) -> CalledTool | None:
        if not isinstance(value, dict) or value.get("name") not in self._names:
            return None
        arguments = value.get("arguments", value.get("parameters"))
        if not isinstance(arguments, dict):
            return None
        return _call(value["name"], json.dumps(arguments, ensure_ascii=False))


def _call(name: str, arguments: str) -> CalledTool:
    return CalledTool(
        id=f"call_{uuid.uuid4().hex[:24]}", function=CalledFunction(name=name, arguments=arguments)
    )


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def for_template(tools: Sequence[Tool] | None) -> list[dict[str, Any]] | None:
    """Tools as chat templates expect them."""
    return [tool.model_dump(exclude_none=True) for tool in tools] if tools else None
