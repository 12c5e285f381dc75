"""Errors as OpenAI's clients expect them. What a client is told is written here or in strobe.errors."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from starlette.exceptions import HTTPException

from strobe.errors import OutOfPagesError, RequestError, StrobeError

LONGEST_NAME = 80
"""Characters of a client's own text that an error repeats."""


class ApiError(HTTPException):
    """An answer that is not 2xx. `param` is the field at fault, `code` a word for programs."""

    def __init__(
        self,
        status_code: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        headers = None if retry_after_s is None else {"retry-after": str(max(1, math.ceil(retry_after_s)))}
        super().__init__(status_code, message, headers)
        self.message = message
        self.param = param
        self.code = code

    def body(self, request_id: str | None = None) -> dict[str, Any]:
        """The answer's JSON."""
        error = {"message": self.message, "type": _type(self.status_code), "param": self.param}
        error["code"] = self.code or _CODES.get(self.status_code)
        return {"error": error | ({"request_id": request_id} if request_id else {})}


_CODES = {401: "invalid_api_key", 404: "not_found", 413: "body_too_large", 429: "overloaded"}


def _type(status_code: int) -> str:
    if status_code == 401:
        return "authentication_error"
    if status_code == 403:
        return "permission_error"
    if status_code == 429:
        return "rate_limit_error"
    return "server_error" if status_code >= 500 else "invalid_request_error"


def internal() -> ApiError:
    return ApiError(
        500, "the server failed on this request; its log has more under the request id", code="internal_error"
    )


def stopping() -> ApiError:
    return ApiError(503, "the server is stopping", code="stopping")


def too_complex() -> ApiError:
    return ApiError(400, "the output's grammar is too complex to follow", code="grammar_too_complex")


def from_strobe(error: StrobeError, param: str | None = None) -> ApiError:
    """A refusal by the engine, whose messages are written for the person who asks."""
    if not isinstance(error, (RequestError, OutOfPagesError)):
        return internal()
    text = str(error)
    named = next((field for field in _FIELDS if text.removeprefix("the ").startswith(field)), None)
    return ApiError(400, text, param=named or param)


_FIELDS = ("prompt", "max_tokens", "min_tokens", "logit_bias", "stop_token_ids", "stop", "n")


def from_validation(errors: Sequence[Any], body: object) -> ApiError:
    """The first field that pydantic refuses, with what it says about it.

    A field that may be of several kinds has errors of each: told are those of the kind that fits furthest.
    """
    if any(error["type"] == "json_invalid" for error in errors):
        return ApiError(400, "the body is not valid JSON", code="invalid_json")
    found = [(_field(error["loc"], body, error["type"]), error) for error in errors]
    first = found[0][0]
    found = [(where, error) for where, error in found if _within(where, first)]
    furthest = max(_reach(where, error) for where, error in found)
    found = [(where, error) for where, error in found if _reach(where, error) == furthest]
    field = found[0][0]
    told = dict.fromkeys(_told(error) for where, error in found if where == field)
    message = " or ".join(list(told)[:4])
    return ApiError(400, f"{field}: {message}" if field else f"the body: {message}", param=field)


def _within(field: str | None, outer: str | None) -> bool:
    return field == outer or (field or "").startswith((f"{outer}.", f"{outer}["))


def _reach(field: str | None, error: Any) -> tuple[bool, int, list[int]]:
    """How far a value fits: its type or not, how deep the fault lies, and how far along each list."""
    path, typed = field or "", not error["type"].endswith("_type")
    return typed, len(re.findall(r"[.\[]", path)), [int(index) for index in re.findall(r"\[(\d+)", path)]


def _told(error: Any) -> str:
    if error["type"] == "extra_forbidden":
        return "unknown field"
    if error["type"] == "missing":
        return "required"
    text: str = error["msg"].removeprefix("Value error, ")
    return text[:1].lower() + text[1:]


def _field(location: Sequence[Any], body: object, kind: str) -> str | None:
    """("body", "messages", 0, "str") → "messages[0]": only the steps that lead into the body."""
    path, value = "", body
    for step in location[1:]:
        if isinstance(value, dict) and isinstance(step, str):
            if step in value:
                value = value[step]
            elif kind != "missing" or step != location[-1]:
                continue
            path += f".{step[:LONGEST_NAME]}" if path else step[:LONGEST_NAME]
        elif isinstance(value, list) and isinstance(step, int) and step < len(value):
            path, value = f"{path}[{step}]", value[step]
    return path or None
