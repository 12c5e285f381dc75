"""Chat templates: programs that come with a checkpoint, run in a sandbox with bounds.

Jinja's immutable sandbox keeps a template from Python's internals and from changing its arguments.
It bounds neither time nor memory, so here: the filters are a short list; every operation that can
make a long text from short ones is measured before it is done, and all that a run makes is counted;
and a trace stops a run past its time.
"""

from __future__ import annotations

import datetime
import json
import re
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import BuiltinMethodType, FrameType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from strobe.checkpoints.files import read_bytes
from strobe.errors import RequestError, TokenizerError

Message = Mapping[str, Any]

TEMPLATE_LIMIT = 256 << 10
TEXT_LIMIT = 4 << 20
"""Characters that the messages may hold, and any one text that a template makes."""
WORK_LIMIT = 16 * TEXT_LIMIT
"""Characters that a template may make in all."""
SECONDS = 2.0

_NUMBER_LIMIT = 10_000
"""The largest count that a method or filter takes: a width, an indent, a repeat."""
_FILTERS = """
    abs capitalize count d default dictsort e escape first float groupby indent int items last length list
    lower map max min reject rejectattr replace reverse round safe select selectattr sort string title trim
    unique upper
"""
_GLOBALS = ("dict", "namespace", "range")
_WIDTH = re.compile(r"\d{4,}|\*|\{[^}]*:[^}]*\{")


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
            _made.characters = 0
            with _time_limit(SECONDS):
                template = self._with_tools if variables.get("tools") else self._template
                return template.render({**variables, "messages": messages})
        except Exception as error:  # whatever the template does wrong
            raise RequestError(f"{self._where}: the chat template refuses: {_brief(error)}") from error


def _parsed(source: str, where: Path | str) -> jinja2.Template:
    if len(source) > TEMPLATE_LIMIT:
        raise TokenizerError(f"{where}: the chat template is longer than {TEMPLATE_LIMIT:,} characters")
    try:
        return _Sandbox().from_string(source)
    except Exception as error:  # a template can break the parser in many ways
        raise TokenizerError(f"{where}: the chat template does not parse: {_brief(error)}") from error


class _Generation(Extension):
    """`{% generation %}` marks what the model says, for training on it: here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012 - as jinja declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Bounded(CodeGenerator):
    """Sends `~` through the sandbox's measured concatenation."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concat([str(part) for part in (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write(")])")


class _Sandbox(ImmutableSandboxedEnvironment):
    code_generator_class = _Bounded
    intercepted_binops = frozenset(("*", "**", "%", "+"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation], cache_size=0
        )
        self.filters = {name: _measured(self.filters[name]) for name in _FILTERS.split()}
        self.filters |= {"join": _join, "tojson": _to_json}
        self.globals = {name: self.globals[name] for name in _GLOBALS}
        self.globals |= {"raise_exception": _raise, "strftime_now": _now}

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """Every block, macro and `~` puts its text together here."""
        kept, length = [], 0
        for part in parts:
            kept.append(part)
            length += len(part)
            _check(length, count=False)
        _check(length)
        return "".join(kept)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        sized = [x for x in (left, right) if isinstance(x, (str, bytes, list, tuple))]
        if operator == "*" and sized:
            counts = [x for x in (left, right) if isinstance(x, int)]
            _check(len(sized[0]) * max(counts, default=0))
        elif operator == "+" and len(sized) == 2:
            _check(len(left) + len(right))
        elif operator == "**" and (abs(left) > _NUMBER_LIMIT or abs(right) > 64):
            raise SecurityError("a power too large")
        elif operator == "%" and isinstance(left, (str, bytes)):
            _check_format(left)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        if isinstance(method, BuiltinMethodType):
            if method.__name__ == "join" and len(args) == 1:
                return _join(args[0], str(method.__self__))
            _check_call(method.__name__, method.__self__, (*args, *kwargs.values()))
        return super().call(__context, __obj, *args, **kwargs)


def _measured(function: Any) -> Any:
    """A filter that is refused where its result could be far longer than its arguments."""
    # jinja marks filters that want its context or environment as their first argument
    skip = 1 if hasattr(function, "jinja_pass_arg") else 0

    def measured(*args: Any, **kwargs: Any) -> Any:
        _check_call(function.__name__.removeprefix("do_"), args[skip], (*args[skip + 1 :], *kwargs.values()))
        return function(*args, **kwargs)

    if skip:
        measured.jinja_pass_arg = function.jinja_pass_arg  # type: ignore[attr-defined]
    return measured


def _check_call(name: str, owner: Any, args: Sequence[Any]) -> None:
    """`owner.name(*args)`, or `owner | name(*args)`."""
    if any(isinstance(x, int) and abs(x) > _NUMBER_LIMIT for x in args):
        raise SecurityError(f"{name} by a number above {_NUMBER_LIMIT:,}")
    texts = [len(x) for x in (*args, owner) if isinstance(x, (str, bytes))]
    if name == "replace" and isinstance(owner, str) and len(args) >= 2 and isinstance(args[0], str):
        _check(len(owner) + (owner.count(args[0]) if args[0] else len(owner) + 1) * len(str(args[1])))
    elif name in ("indent", "expandtabs"):
        _check(sum(texts) * (1 + max((len(x) if isinstance(x, str) else int(x) for x in args), default=8)))
    elif name in ("format", "format_map"):
        _check_format(owner)
    elif name == "translate":
        raise SecurityError("translate is not for templates")


_made = threading.local()


def _check(length: int, *, count: bool = True) -> None:
    """Refuse a text of this length, or one that makes it too many in all."""
    if length > TEXT_LIMIT:
        raise SecurityError(f"a text of more than {TEXT_LIMIT:,} characters")
    if count:
        _made.characters = getattr(_made, "characters", 0) + length
        if _made.characters > WORK_LIMIT:
            raise SecurityError(f"more than {WORK_LIMIT:,} characters made")


def _join(value: Iterable[Any], d: str = "", attribute: str | None = None) -> str:
    if attribute is not None:
        value = [item.get(attribute, "") for item in value]
    glued = (text for item in value for text in (d, str(item)))
    next(glued, None)
    return _Sandbox.concat(glued)


def _check_format(form: Any) -> None:
    if _WIDTH.search(str(form)):
        raise SecurityError("a format with a width of four digits or one that is computed")


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


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise in a template's own lines once `seconds` have passed; only this thread is traced."""
    end = time.monotonic() + seconds

    def line(frame: FrameType, event: str, arg: Any) -> Any:
        if time.monotonic() > end:
            raise SecurityError(f"more than {seconds:g} seconds")
        return line

    def call(frame: FrameType, event: str, arg: Any) -> Any:
        return line if frame.f_code.co_filename == "<template>" else None

    before = sys.gettrace()
    sys.settrace(call)
    try:
        yield
    finally:
        sys.settrace(before)


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False, **options: Any) -> str:
    """JSON as templates expect it: not escaped for HTML."""
    if indent is not None and not 0 <= indent <= 16:
        raise SecurityError("tojson with an indent above 16")
    allowed = {name: options[name] for name in ("separators", "sort_keys") if name in options}
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, **allowed)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    _check_format(form)
    return datetime.datetime.now().strftime(form)


def _brief(error: Exception) -> str:
    return f"{str(error)[:300] or type(error).__name__}"
