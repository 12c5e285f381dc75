"""The socket to listen on, had before anything large is loaded. Imports no torch."""

from __future__ import annotations

import socket

from strobe.errors import SettingsError
from strobe.server.config import ServerConfig


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
