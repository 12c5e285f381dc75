"""Request bodies, with a bound on everything in them. What no field here names is refused."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, FailFast, Field, model_validator

from strobe.engine.sampling_params import (
    MAX_BIASES,
    MAX_LOGPROBS,
    MAX_N,
    MAX_STOP_CHARS,
    MAX_STOPS,
    MAX_TOKENS,
)

MAX_PROMPTS = 256
MAX_MESSAGES = 4096
MAX_TOOLS = 128
MAX_GRAMMAR_CHARS = 32 << 10
"""Characters of a regex, or of a schema's JSON."""
MAX_DEPTH = 32
"""Levels of a schema."""
MAX_CHOICES = 512

_GIVEN = {"messages", "tools", "add_generation_prompt"}
"""What a chat template is given of the request itself."""

MAX_FIELDS = 100
"""Fields of one object: more are refused before each is looked at."""

TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
Name = Annotated[str, Field(min_length=1, max_length=256)]
Ignored = Annotated[Any, Field(description="Accepted for other servers' clients; it changes nothing.")]


def _bounded(value: Any) -> Any:
    stack = [(value, 1)]
    while stack:
        item, depth = stack.pop()
        if depth > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
        children = item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
        stack.extend((child, depth + 1) for child in children)
    if len(json.dumps(value)) > MAX_GRAMMAR_CHARS:
        raise ValueError(f"longer than {MAX_GRAMMAR_CHARS} characters")
    return value


def _free(value: dict[str, Any]) -> dict[str, Any]:
    if taken := sorted(_GIVEN & value.keys()):
        raise ValueError(f"{taken[0]!r} is a field of the request's own")
    return value


def _few(most: int) -> BeforeValidator:
    """Count an object's fields before they are looked at one by one."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > most:
            raise ValueError(f"{len(value)} fields; supported: up to {most}")
        return value

    return BeforeValidator(check)


class FirstError(FailFast):
    """One wrong item is enough: a list of a million must not make a million errors."""

    __hash__ = object.__hash__  # a part of a union's type must have one


Tokens = Annotated[list[TokenId], FirstError(), Field(min_length=1, max_length=MAX_TOKENS)]
JsonSchema = Annotated[dict[str, Any], AfterValidator(_bounded)]
TemplateVariables = Annotated[
    dict[str, Any],
    AfterValidator(_bounded),
    AfterValidator(_free),
    Field(description="More for the model's own chat template, as enable_thinking. The name is vLLM's."),
]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > MAX_FIELDS:
            raise ValueError(f"{len(value)} fields; supported: up to {MAX_FIELDS}")
        return value


class StructuredOutputs(_Model):
    """What the output must keep to: one of these. The names are vLLM's."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 1, "maxProperties": 1})

    json_schema: JsonSchema | None = Field(None, alias="json")
    regex: str | None = Field(None, min_length=1, max_length=MAX_GRAMMAR_CHARS)
    choice: list[Annotated[str, Field(min_length=1, max_length=1024)]] | None = Field(
        None, min_length=1, max_length=MAX_CHOICES
    )


class JsonSchemaFormat(_Model):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    schema_: JsonSchema | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(_Model):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StreamOptions(_Model):
    include_usage: bool = False
    include_obfuscation: Ignored = None


class Sampling(_Model):
    """Fields of both kinds of completion."""

    model: Name | None = None
    max_tokens: int | None = Field(None, ge=0, le=MAX_TOKENS)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=1 << 31)
    min_p: float | None = Field(None, ge=0, le=1)
    n: int | None = Field(None, ge=1, le=MAX_N)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0.01, le=100)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stop: (
        Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
        | Annotated[
            list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]], Field(max_length=MAX_STOPS)
        ]
        | None
    ) = None
    stop_token_ids: list[TokenId] | None = Field(None, max_length=MAX_STOPS)
    ignore_eos: bool = False
    min_tokens: int = Field(0, ge=0, le=MAX_TOKENS)
    logit_bias: (
        Annotated[
            dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
            _few(MAX_BIASES),
            Field(max_length=MAX_BIASES),
        ]
        | None
    ) = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    return_token_ids: bool = False
    user: Ignored = None
    metadata: Ignored = None
    store: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None


class CompletionRequest(Sampling):
    """The body of /v1/completions."""

    prompt: (
        str
        | Tokens
        | Annotated[list[str], FirstError(), Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[Tokens], FirstError(), Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    best_of: int | None = Field(None, ge=1, le=MAX_N)
    suffix: None = None


class TextPart(_Model):
    type: Literal["text"]
    text: str


class FunctionCall(_Model):
    name: Name
    arguments: str


class ToolCall(_Model):
    id: Name
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(_Model):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    name: Annotated[str, Field(pattern=r"^[^\s<|\\/>]{1,64}$")] | None = None
    tool_calls: Annotated[list[ToolCall], Field(min_length=1, max_length=MAX_TOOLS)] | None = None
    tool_call_id: Name | None = None
    refusal: None = None
    annotations: Ignored = None
    audio: None = None
    function_call: None = None


class Function(_Model):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: JsonSchema | None = None
    strict: bool | None = None


class Tool(_Model):
    type: Literal["function"]
    function: Function


class FunctionName(_Model):
    name: Name


class NamedTool(_Model):
    type: Literal["function"]
    function: FunctionName


class ChatRequest(Sampling):
    """The body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: TemplateVariables | None = None
    modalities: list[Literal["text"]] | None = None


class TokenizeRequest(_Model):
    """A prompt, or messages that the chat template makes one of."""

    model: Name | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1, max_length=MAX_MESSAGES)
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    chat_template_kwargs: TemplateVariables | None = None
    return_token_strs: bool = False


class DetokenizeRequest(_Model):
    model: Name | None = None
    tokens: Annotated[list[TokenId], FirstError(), Field(max_length=MAX_TOKENS)]
