"""The routes."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from prometheus_client import generate_latest
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse, Response

from strobe import __version__
from strobe.engine.llm import LLM
from strobe.server import answers
from strobe.server.chat import chat, message_of
from strobe.server.completions import complete
from strobe.server.config import ServerConfig
from strobe.server.errors import ApiError, from_validation
from strobe.server.gate import Gate
from strobe.server.page import page
from strobe.server.replies import Json, JsonReply, error_reply
from strobe.server.schema import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from strobe.server.service import Service

_TEXT = "text/plain; version=0.0.4; charset=utf-8"
_COMMON = (400, 401, 403, 404, 405, 408, 413, 415, 429, 500, 503)


def create_app(llm: LLM, config: ServerConfig | None = None) -> FastAPI:
    """The server's ASGI app around a loaded model. Its lifespan starts and stops the engine's thread."""
    config = config or ServerConfig()
    service = Service(llm, config)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
        await service.start()
        yield
        await service.stop()

    app = FastAPI(
        title="strobe",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        default_response_class=Json,
        separate_input_output_schemas=False,
    )
    app.state.service = service
    _add_openai_routes(app, service)
    _add_other_routes(app, service)
    app.add_exception_handler(HTTPException, _refuse)
    app.add_exception_handler(RequestValidationError, _refuse_body)
    app.add_middleware(Gate, config=config, metrics=service.metrics)
    if config.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(config.allowed_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-request-id"],
            expose_headers=["x-request-id", "retry-after"],
        )
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def _add_openai_routes(app: FastAPI, service: Service) -> None:
    errors: dict[int | str, dict[str, Any]] = answers.documented(*_COMMON, 504)

    def streamed(answer: type) -> dict[int | str, dict[str, Any]]:
        event = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
        events = {"text/event-stream": {"schema": event}}
        return {200: {"model": answer, "content": events}, **errors}

    @app.post("/v1/completions", response_model=None, responses=streamed(answers.Completion))
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Text that goes on from one or more prompts."""
        return await complete(service, body, request.scope.get("api_key"))

    @app.post("/v1/chat/completions", response_model=None, responses=streamed(answers.ChatCompletion))
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """The answer to a conversation."""
        return await chat(service, body, request.scope.get("api_key"))

    def card(name: str) -> answers.ModelCard:
        context = service.llm.engine.max_model_len
        return answers.ModelCard(
            id=name, created=service.created, root=service.llm.name, max_model_len=context
        )

    @app.get("/v1/models", responses=answers.documented(401, 403))
    async def models() -> answers.ModelList:
        """The names that the model is served by."""
        return answers.ModelList(data=[card(name) for name in service.names])

    @app.get("/v1/models/{name:path}", responses=answers.documented(401, 403, 404))
    async def model(name: str) -> answers.ModelCard:
        """One of them."""
        return card(service.check_model(name))


def _add_other_routes(app: FastAPI, service: Service) -> None:
    errors = answers.documented(*_COMMON)

    @app.post("/tokenize", response_model=None, responses={200: {"model": answers.Tokens}, **errors})
    async def tokenize(body: TokenizeRequest) -> Response:
        """Token ids of a text, or of a conversation."""
        return JsonReply(_tokens(service, body), service.config.request_timeout_s)

    @app.post("/detokenize", response_model=None, responses={200: {"model": answers.Detokenized}, **errors})
    async def detokenize(body: DetokenizeRequest) -> Response:
        """The text of token ids, special tokens included."""
        return JsonReply(_text(service, body), service.config.request_timeout_s)

    @app.head("/health", include_in_schema=False)
    @app.get("/health", responses={503: {"model": answers.Health}}, response_model=answers.Health)
    async def health() -> Response:
        """200 while the engine steps, 503 once it does not."""
        healthy = service.bridge.healthy
        return Json(answers.Health(status="ok" if healthy else "failed"), 200 if healthy else 503)

    @app.get("/version", responses=answers.documented(401, 403))
    async def version() -> answers.Version:
        return answers.Version(version=__version__)

    @app.get("/metrics", response_class=PlainTextResponse, responses=answers.documented(401, 403))
    async def metrics() -> Response:
        """Prometheus's text format."""
        return Response(generate_latest(service.metrics.registry), media_type=_TEXT)

    @app.get("/", include_in_schema=False)
    async def chat_page() -> Response:
        return page()


async def _tokens(service: Service, body: TokenizeRequest) -> answers.Tokens:
    service.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "prompt: give prompt or messages", param="prompt")
    if body.messages is not None:
        text = await service.render(
            [message_of(message) for message in body.messages],
            add_generation_prompt=body.add_generation_prompt,
            variables=body.chat_template_kwargs,
        )
        tokens = await service.encode(text, "messages", special=False)
    else:
        tokens = await service.encode(body.prompt or "", "prompt", special=body.add_special_tokens)

    def told() -> answers.Tokens:
        strings = [service.token_text(token) for token in tokens] if body.return_token_strs else None
        context = service.llm.engine.max_model_len
        return answers.Tokens(count=len(tokens), max_model_len=context, tokens=tokens, token_strs=strings)

    return await service.in_thread(told)


async def _text(service: Service, body: DetokenizeRequest) -> answers.Detokenized:
    service.check_model(body.model)
    text = await service.in_thread(service.tokenizer.decode, body.tokens, skip_special=False)
    return answers.Detokenized(prompt=text)


async def _refuse(request: Request, error: Exception) -> Response:
    if isinstance(error, ApiError):
        return error_reply(error, request.scope)
    status = error.status_code if isinstance(error, HTTPException) else 500
    told = ApiError(status, _PLAIN.get(status, "the request was refused"))
    if isinstance(error, HTTPException):
        told.headers = error.headers
    return error_reply(told, request.scope)


_PLAIN = {400: "the body is not valid JSON", 404: "no such route", 405: "no such method on this route"}


async def _refuse_body(request: Request, error: Exception) -> Response:
    if not isinstance(error, RequestValidationError):
        raise error
    return error_reply(from_validation(error.errors(), error.body), request.scope)


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's description, less the 422 that no route answers with."""
    from fastapi.openapi.utils import get_openapi

    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        for operations in schema["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            schema.get("components", {}).get("schemas", {}).pop(name, None)
        app.openapi_schema = schema
    return app.openapi_schema
