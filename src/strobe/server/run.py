"""A server process: from a loaded model to its last answer."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from types import FrameType

import uvicorn

from strobe.engine.llm import LLM
from strobe.errors import SettingsError
from strobe.server.app import create_app
from strobe.server.config import ServerConfig

SWITCH_S = 0.001
"""How long the engine's thread may keep the interpreter from the event loop's."""
BACKLOG = 2048
KEEP_ALIVE_S = 30


class _Server(uvicorn.Server):
    """Calls `ready` once it answers. The first signal drains, a second one stops at once."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], object]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.should_exit:
            self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True


def bind(config: ServerConfig) -> socket.socket:
    """The socket to listen on, had before the model is loaded.

    Raises:
        SettingsError: the address is taken, not this machine's, or not allowed.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise SettingsError(
            f"cannot listen on {config.host} port {config.port}: {error.strerror}",
            hint="--port 0 takes a free one",
        ) from error
    return bound


def url_of(bound: socket.socket) -> str:
    """Where a browser on this machine finds the server."""
    host, port = bound.getsockname()[:2]
    if host in ("0.0.0.0", "::"):  # noqa: S104 - read, not bound
        host = "localhost"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(llm: LLM, config: ServerConfig, bound: socket.socket, ready: Callable[[], object]) -> None:
    """Serve until a signal says stop; `ready` is called once requests are answered."""
    sys.setswitchinterval(SWITCH_S)
    options = uvicorn.Config(
        create_app(llm, config),
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=max(1, round(config.drain_timeout_s)),
        ws="none",
    )
    _Server(options, ready).run([bound])
