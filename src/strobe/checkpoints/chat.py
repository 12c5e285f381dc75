"""Chat templates: programs that come with a checkpoint, found and run (template_sandbox.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from strobe.checkpoints.files import read_bytes
from strobe.checkpoints.template_sandbox import TEXT_LIMIT, Sandbox, bounded
from strobe.errors import RequestError, TokenizerError

Message = Mapping[str, Any]

TEMPLATE_LIMIT = 256 << 10


class ChatTemplate:
    """A checkpoint's template, and the one that it has for conversations with tools, where that is another.

    `where` names their file in messages.
    """

    def __init__(
        self, source: str, where: Path | str = "chat template", *, with_tools: str | None = None
    ) -> None:
        self.source = source
        self._where = where
        self._template = _parsed(source, where)
        self._with_tools = self._template if with_tools is None else _parsed(with_tools, where)

    @classmethod
    def find(cls, settings: Mapping[str, Any], settings_path: Path, path: Path | None) -> ChatTemplate | None:
        """The template of a chat_template.jinja, or of tokenizer_config.json.

        Of several there the one named "default" is taken, and for tools "tool_use".
        """
        if path is not None:
            try:
                return cls(read_bytes(path, 4 * TEMPLATE_LIMIT).decode(), path)
            except UnicodeDecodeError as error:
                raise TokenizerError(f"{path} is not UTF-8: {error}") from error
        source, with_tools = settings.get("chat_template"), None
        if isinstance(source, list):
            named = {item.get("name"): item.get("template") for item in source if isinstance(item, dict)}
            source, with_tools = named.get("default"), named.get("tool_use")
        if source is None:
            return None
        for given in (source, with_tools):
            if not isinstance(given, str | None):
                raise TokenizerError(
                    f"{settings_path}: chat_template is a {type(given).__name__}; supported: text"
                )
        return cls(source, settings_path, with_tools=with_tools)

    def render(self, messages: Sequence[Message], variables: Mapping[str, Any]) -> str:
        """The text of a conversation.

        Raises:
            RequestError: the messages are too long, the template refuses them, breaks, or runs too long.
        """
        if (size := _size(messages) + _size(list(variables.values()))) > TEXT_LIMIT:
            raise RequestError(f"the messages hold {size:,} characters; supported: up to {TEXT_LIMIT:,}")
        try:
            with bounded():
                template = self._with_tools if variables.get("tools") else self._template
                return template.render({**variables, "messages": messages})
        except Exception as error:  # whatever the template does wrong
            raise RequestError(f"{self._where}: the chat template refuses: {_brief(error)}") from error


def _parsed(source: str, where: Path | str) -> jinja2.Template:
    if len(source) > TEMPLATE_LIMIT:
        raise TokenizerError(f"{where}: the chat template is longer than {TEMPLATE_LIMIT:,} characters")
    try:
        with bounded():  # constants are folded
            return Sandbox().from_string(source)
    except Exception as error:  # a template can break the parser in many ways
        raise TokenizerError(f"{where}: the chat template does not parse: {_brief(error)}") from error


def _size(value: Any) -> int:
    """Characters in all the strings of nested messages."""
    total, stack = 0, [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            total += len(item)
        elif isinstance(item, Mapping):
            stack.extend((*item.keys(), *item.values()))
        elif isinstance(item, (list, tuple)):
            stack.extend(item)
        else:
            total += 1
    return total


def _brief(error: Exception) -> str:
    return f"{str(error)[:300] or type(error).__name__}"
