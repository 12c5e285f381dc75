"""Many engines behind one address, by Ray Serve: a gateway, and replicas that it spreads requests over.

    serve run strobe.server.replicas:build model=DIR min_replicas=2 max_replicas=8

A replica runs the same app as `strobe serve`, each on the GPU that Ray gives it. Requests that begin
alike go to the same replica while loads are even, since its prefix cache has seen their beginning.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Any

import anyio
from pydantic import BaseModel, ConfigDict
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Message

from strobe.engine.config import EngineConfig
from strobe.engine.llm import LLM
from strobe.errors import MissingExtraError
from strobe.server.app import create_app
from strobe.server.config import ServerConfig
from strobe.server.errors import ApiError
from strobe.server.replies import Json

try:
    from ray import serve
    from ray.serve.config import RequestRouterConfig
    from ray.serve.handle import DeploymentHandle
except ImportError as error:
    raise MissingExtraError.of("ray", "ray") from error

PREFIX_ROUTERS = (
    "ray.serve.llm.request_router",
    # the same class without the imports of all of Ray's own LLM engine
    "ray.llm._internal.serve.routing_policies.prefix_aware.prefix_aware_router",
)
ROUTED_CHARS = 4096
"""How much of a prompt is looked at to choose a replica."""
UNEVEN = 8
"""Where queues differ by more requests, the shorter one is taken whatever the prompt."""
ALIKE = 0.3
"""Share of a prompt that must have been seen by a replica before it is preferred."""

_log = logging.getLogger(__name__)


class Replicas(BaseModel):
    """What to run, and how many. `engine` and `server` are fields of EngineConfig and ServerConfig."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    engine: dict[str, Any] = {}
    server: dict[str, Any] = {}
    min_replicas: int = 1
    max_replicas: int = 1
    target_ongoing_requests: int = 32
    """Requests that a replica runs before another one is started."""
    num_gpus: float = 0
    num_cpus: float = 1
    prefix_aware: bool = True


@dataclass(frozen=True)
class Call:
    """One HTTP request on its way to a replica; Ray's router reads `prompt`."""

    prompt: str
    scope: dict[str, Any]
    body: bytes = field(repr=False)


class Replica:
    """One engine with its app."""

    async def __init__(self, given: Replicas) -> None:  # type: ignore[misc]  # Ray awaits it
        self.config = ServerConfig(**{"host": "0.0.0.0", **given.server})  # noqa: S104 - Ray's proxy listens
        llm = LLM(given.model, device=given.device, dtype=given.dtype, config=EngineConfig(**given.engine))
        self.app = create_app(llm, self.config)
        await self.app.router.lifespan_context(self.app).__aenter__()
        self.name = serve.get_replica_context().replica_id.unique_id

    def check_health(self) -> None:
        """Ray starts another replica in place of one that raises."""
        if not self.app.state.service.bridge.healthy:
            raise RuntimeError("the engine does not step")

    async def answer(self, call: Call) -> AsyncGenerator[Message, None]:
        """The app's answer as ASGI messages; cancelling it is the client's going away."""
        sender, messages = anyio.create_memory_object_stream[Message](16)
        gone = anyio.Event()
        unread = [{"type": "http.request", "body": call.body, "more_body": False}]

        async def receive() -> Message:
            if unread:
                return unread.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def run() -> None:
            async with sender:
                await self.app({**call.scope, "app": self.app}, receive, sender.send)

        async with anyio.create_task_group() as group:
            group.start_soon(run)
            try:
                async for message in messages:
                    if message["type"] == "http.response.start":
                        message["headers"] = [*message["headers"], (b"x-replica", self.name.encode())]
                    yield message
            finally:
                gone.set()
                group.cancel_scope.cancel()


class Gateway:
    """Takes HTTP requests, and hands each to the replica that Ray's router chooses."""

    def __init__(self, replica: DeploymentHandle, max_body_bytes: int) -> None:
        self.replica = replica.options(stream=True).answer
        self.max_body_bytes = max_body_bytes

    async def __call__(self, request: Request) -> Response:
        try:
            body = await self._body(request)
        except ApiError as refusal:
            return Json(refusal.body(), refusal.status_code)
        names = ("type", "method", "path", "raw_path", "query_string", "headers", "scheme", "http_version")
        scope = {name: request.scope[name] for name in names if name in request.scope}
        messages = self.replica.remote(Call(prompt_of(body) or request.url.path, scope, body))
        try:
            start = await anext(messages)
        except Exception:
            lost = ApiError(503, "the replica went away", code="replica_lost", retry_after_s=1)
            return Json(lost.body(), lost.status_code, dict(lost.headers or {}))

        async def chunks() -> AsyncGenerator[bytes, None]:
            try:
                async for message in messages:
                    yield message.get("body", b"")
            except BaseException:  # the client went away
                messages.cancel()
                raise

        response = StreamingResponse(chunks(), start["status"])
        # Ray's proxy gives each answer its id itself, the same one
        response.raw_headers = [(name, value) for name, value in start["headers"] if name != b"x-request-id"]
        return response

    async def _body(self, request: Request) -> bytes:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self.max_body_bytes:
                raise ApiError(413, f"the body is larger than {self.max_body_bytes} bytes")
        return bytes(body)


def prompt_of(body: bytes) -> str:
    """The beginning of what the model will read, for the router; "" where it cannot be told."""
    try:
        given = json.loads(body)
        parts = given["messages"] if "messages" in given else given["prompt"]
        if isinstance(parts, str):
            return parts[:ROUTED_CHARS]
        texts = (str(part["content"] if isinstance(part, dict) else part) for part in parts[:ROUTED_CHARS])
        return " ".join(texts)[:ROUTED_CHARS]
    except (ValueError, TypeError, LookupError, RecursionError):
        return ""


def _router() -> dict[str, Any]:
    """Ray's prefix-aware router, where this Ray has it; otherwise the shorter of two queues is taken."""
    for module in PREFIX_ROUTERS:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
            name = f"{module}:PrefixCacheAffinityRouter"
            return {
                "request_router_config": RequestRouterConfig(
                    request_router_class=name,
                    request_router_kwargs={"imbalanced_threshold": UNEVEN, "match_rate_threshold": ALIKE},
                )
            }
    _log.warning("this Ray has no prefix-aware router")
    return {}


def build(args: Replicas | Mapping[str, Any]) -> serve.Application:
    """The application that `serve run` and a YAML file's `import_path` name; `args` are a `Replicas`."""
    given = Replicas.model_validate(args)
    config, engine = ServerConfig(**given.server), EngineConfig(**given.engine)
    replica = serve.deployment(
        Replica,
        name="Replica",
        max_ongoing_requests=engine.max_num_seqs + config.max_queue,
        ray_actor_options={"num_cpus": given.num_cpus, "num_gpus": given.num_gpus},
        autoscaling_config={
            "min_replicas": given.min_replicas,
            "max_replicas": max(given.min_replicas, given.max_replicas),
            "target_ongoing_requests": given.target_ongoing_requests,
        },
        health_check_period_s=5,
        graceful_shutdown_timeout_s=config.drain_timeout_s,
        **(_router() if given.prefix_aware else {}),
    )
    gateway = serve.deployment(
        Gateway, name="Gateway", max_ongoing_requests=10_000, ray_actor_options={"num_cpus": 0}
    )
    return gateway.bind(replica.bind(given), config.max_body_bytes)
