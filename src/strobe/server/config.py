"""What a server lets its clients do."""

from __future__ import annotations

import math
from dataclasses import dataclass

from strobe.errors import SettingsError

_INTEGERS = {
    "port": (0, 65535),
    "max_queue": (1, 1 << 20),
    "max_queued_tokens": (1, 1 << 30),
    "max_body_bytes": (1 << 10, 1 << 30),
}
_LISTS = ("api_keys", "served_names", "allowed_origins", "allowed_hosts")
_SECONDS = ("queue_timeout_s", "request_timeout_s", "drain_timeout_s")


@dataclass(frozen=True)
class ServerConfig:
    """Bounds and doors of one server.

    Raises:
        SettingsError: a value out of range.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes a free one."""
    api_keys: tuple[str, ...] = ()
    """One of these opens every route but /health; none leaves all open."""
    served_names: tuple[str, ...] = ()
    """What clients call the model; the first is in answers. Where there is none: the checkpoint's own."""
    max_queue: int = 256
    """Requests that wait for their first step; more are turned away."""
    max_queued_tokens: int = 1 << 18
    """Prompt tokens of those that wait."""
    queue_timeout_s: float = 60.0
    """Longest wait for the first step."""
    request_timeout_s: float = 600.0
    """Longest time from arrival to the last token."""
    drain_timeout_s: float = 30.0
    """Time that running requests get to end after SIGTERM."""
    max_body_bytes: int = 2 << 20
    allowed_origins: tuple[str, ...] = ()
    """Web origins whose pages may call the API (CORS)."""
    allowed_hosts: tuple[str, ...] = ()
    """Host names that a keyless server on loopback answers to, besides the loopback ones."""
    log_prompts: bool = False

    def __post_init__(self) -> None:
        for name, (low, high) in _INTEGERS.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                raise SettingsError(f"{name} is {value!r}; supported: an integer from {low} to {high}")
        for name in _SECONDS:
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise SettingsError(f"{name} is {value!r}; supported: a positive number of seconds")
        for name in _LISTS:
            value = getattr(self, name)
            if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
                raise SettingsError(f"{name} is no list of texts")
        if any(not key or not key.isascii() or not key.isprintable() for key in self.api_keys):
            raise SettingsError("an API key is empty or holds more than printable ASCII")
        if any(not name for name in self.served_names):
            raise SettingsError("a served model name is empty")

    @property
    def on_loopback(self) -> bool:
        return self.host in LOOPBACK_HOSTS


LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")
