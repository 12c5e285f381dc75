"""The sandbox that chat templates run in: Jinja's own, with bounds.

Jinja's immutable sandbox keeps a template from Python's internals and from changing its arguments.
It bounds neither time nor memory, so here: the filters are a short list; every operation that can
make a long text from short ones is measured before it is done, and all that a run makes is counted;
so is every list as it would be written out, since one that holds another twice, again and again, is
longer than any memory; and a trace stops a run past its time.
"""

from __future__ import annotations

import datetime
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, MappingView, Sequence
from contextlib import contextmanager
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
from jinja2.utils import Namespace

TEXT_LIMIT = 4 << 20
"""Characters that the messages may hold, and any one text that a template makes."""
WORK_LIMIT = 16 * TEXT_LIMIT
"""Characters that a template may make in all."""
SECONDS = 2.0

_NUMBER_LIMIT = 10_000
"""The largest count that a method or filter takes: a width, an indent, a repeat."""
_BITS_LIMIT = 4096
"""Of an integer that is reckoned with: products and quotients of long ones take minutes."""
_FORM_LIMIT = 1024
"""Characters of a date's form."""
_WIDEST = 1000
"""Characters that a field of a format takes besides what it shows: its width has three digits."""
_FILTERS = """
    abs capitalize count d default dictsort e escape first float groupby indent int items last length list
    lower map max min reject rejectattr replace reverse round safe select selectattr sort string title trim
    unique upper
"""
_GLOBALS = ("dict", "range")
_WIDTH = re.compile(r"\d{4,}|\*|\{[^}]*:[^}]*\{")


class _Generation(Extension):
    """`{% generation %}` marks what the model says, for training on it: here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012 - as jinja declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Bounded(CodeGenerator):
    """Sends `~` through the sandbox's measured concatenation, and measures lists that are put together."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concat([str(part) for part in (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write(")])")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._measured(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self._measured(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx == "load":
            self._measured(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def _measured(self, visit: Callable[[Any, Frame], None], node: nodes.Node, frame: Frame) -> None:
        self.write("environment.measured(")
        visit(node, frame)
        self.write(")")


class _Namespace(Namespace):
    """Written out by its name alone: its attributes may hold it."""

    def __repr__(self) -> str:
        return "<namespace>"


class Sandbox(ImmutableSandboxedEnvironment):
    code_generator_class = _Bounded
    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation], cache_size=0
        )
        self.filters = {name: _measured(self.filters[name]) for name in _FILTERS.split()}
        self.filters |= {"join": _join, "tojson": _to_json}
        self.globals = {name: self.globals[name] for name in _GLOBALS}
        self.globals |= {"namespace": _Namespace, "raise_exception": _raise, "strftime_now": _now}

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

    @staticmethod
    def measured(value: Any) -> Any:
        """The value itself, if it is no text that is too long, nor would be one written out."""
        if isinstance(value, str):
            _check(len(value), count=False)
        _check_written(_written(value))
        return value

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        sized = [x for x in (left, right) if isinstance(x, (str, bytes, list, tuple))]
        written = 0
        if any(isinstance(x, int) and x.bit_length() > _BITS_LIMIT for x in (left, right)):
            raise SecurityError("a number too large")
        if operator == "*" and sized:
            count = max((x for x in (left, right) if isinstance(x, int)), default=0)
            _check(len(sized[0]) * count)
            _check_written(written := _written(sized[0]) * count)
        elif operator == "+" and len(sized) == 2:
            _check(len(left) + len(right))
            _check_written(written := _written(left) + _written(right))
        elif operator == "**" and (abs(left) > _NUMBER_LIMIT or abs(right) > 64):
            raise SecurityError("a power too large")
        elif operator == "%" and isinstance(left, (str, bytes)):
            _check_format(left, right, "%")
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, (list, tuple)):  # known without a look at each of its members
            _run.written[id(result)] = result, written
        return result

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        if isinstance(method, BuiltinMethodType):
            if method.__name__ == "join" and len(args) == 1:
                return _join(args[0], str(method.__self__))
            _check_call(method.__name__, method.__self__, (*args, *kwargs.values()))
        _check_written(sum(map(_written, (*args, *kwargs.values()))))
        return __self.measured(super().call(__context, __obj, *args, **kwargs))


def _measured(function: Any) -> Any:
    """A filter that is refused where its result could be far longer than its arguments."""
    # jinja marks filters that want its context or environment as their first argument
    skip = 1 if hasattr(function, "jinja_pass_arg") else 0

    def measured(*args: Any, **kwargs: Any) -> Any:
        _check_call(function.__name__.removeprefix("do_"), args[skip], (*args[skip + 1 :], *kwargs.values()))
        return Sandbox.measured(function(*args, **kwargs))

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
        _check_format(owner, args, "{")
    elif name == "translate":
        raise SecurityError("translate is not for templates")


class _Run(threading.local):
    """Of this thread."""

    characters = 0
    """Made so far."""
    end = 0.0
    """When its time is over."""

    def __init__(self) -> None:
        self.written: dict[int, tuple[Any, int]] = {}
        """Lists and mappings by id, each with its length written out."""


_run = _Run()


def _written(value: Any) -> int:
    """About how many characters `str(value)` has: what stands in it twice counts twice."""
    if isinstance(value, (str, bytes)):
        return 2 + len(value)
    if not isinstance(value, (list, tuple, Mapping, MappingView)):
        return 1 + value.bit_length() // 3 if isinstance(value, int) else 16
    kept, length = _run.written.get(id(value), (value, 0))
    if not length:
        _check_time()
        mapping = getattr(value, "mapping", value)  # of a view, whose items are pairs made anew each time
        parts = (*mapping.keys(), *mapping.values()) if isinstance(mapping, Mapping) else kept
        length = 2 + sum(2 + _written(part) for part in parts)
        _run.written[id(value)] = value, length
    return length


def _check_written(length: int) -> None:
    if length > WORK_LIMIT:
        raise SecurityError(f"a list of more than {WORK_LIMIT:,} characters")


def _check(length: int, *, count: bool = True) -> None:
    """Refuse a text of this length, or one that makes it too many in all."""
    if length > TEXT_LIMIT:
        raise SecurityError(f"a text of more than {TEXT_LIMIT:,} characters")
    if count:
        _run.characters += length
        if _run.characters > WORK_LIMIT:
            raise SecurityError(f"more than {WORK_LIMIT:,} characters made")


def _join(value: Iterable[Any], d: str = "", attribute: str | None = None) -> str:
    if attribute is not None:
        value = [item.get(attribute, "") for item in value]
    glued = (text for item in value for text in (d, str(item)))
    next(glued, None)
    return Sandbox.concat(glued)


def _check_format(form: Any, shown: Any, mark: str) -> None:
    """`mark` begins a field of the form."""
    text = str(form)
    if _WIDTH.search(text):
        raise SecurityError("a format with a width of four digits or one that is computed")
    _check(len(text) + text.count(mark) * (_WIDEST + _written(shown)))  # each field may show it all


def _check_time() -> None:
    if time.monotonic() > _run.end:
        raise SecurityError(f"more than {SECONDS:g} seconds")


@contextmanager
def bounded() -> Iterator[None]:
    """Counts what templates make within; looks at the clock in each of their lines, and at each call in their
    filters."""

    def line(frame: FrameType, event: str, arg: Any) -> Any:
        _check_time()
        return line

    def call(frame: FrameType, event: str, arg: Any) -> Any:
        where = frame.f_code.co_filename
        if where == "<template>":
            return line
        if where == jinja2.filters.__file__:
            _check_time()
        return None

    _run.characters, _run.end = 0, time.monotonic() + SECONDS
    before = sys.gettrace()
    sys.settrace(call)
    try:
        yield
    finally:
        sys.settrace(before)
        _run.written.clear()


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False, **options: Any) -> str:
    """JSON as templates expect it: not escaped for HTML."""
    if indent is not None and not 0 <= indent <= 16:
        raise SecurityError("tojson with an indent above 16")
    allowed = {name: options[name] for name in ("separators", "sort_keys") if name in options}
    encoder = json.JSONEncoder(indent=indent, ensure_ascii=ensure_ascii, **allowed)
    if indent is None:
        return Sandbox.measured(encoder.encode(value))
    return Sandbox.concat(encoder.iterencode(value))  # of what is nested deep, blanks are the most


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    if len(form) > _FORM_LIMIT:
        raise SecurityError(f"a date's form of more than {_FORM_LIMIT} characters")
    return datetime.datetime.now().strftime(form)
