"""A server process: from a loaded model to its last answer."""

from __future__ import annotations

import gc
import logging
import signal
import socket
import sys
from collections.abc import Callable
from types import FrameType

import uvicorn

from strobe.engine.llm import LLM
from strobe.engine.sampling_params import SamplingParams
from strobe.server.app import create_app
from strobe.server.config import ServerConfig
from strobe.server.protocol import BoundedProtocol

SWITCH_S = 0.001
"""How long the engine's thread may keep the interpreter from the event loop's."""
BACKLOG = 2048
KEEP_ALIVE_S = 30
_STOPS = (signal.SIGINT, signal.SIGTERM)


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
        if self.force_exit:
            logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # what is cut off now is meant to be


def serve(llm: LLM, config: ServerConfig, bound: socket.socket, ready: Callable[[], object]) -> None:
    """Serve until a signal says stop; `ready` is called once requests are answered. For the main thread of a
    process that ends behind it, deaf to more signals.

    A first token is drawn before, so that no client waits for kernels to be compiled; and what is loaded by
    then is no garbage: to look through it again stops engine and event loop for 0.2 s.
    """
    sys.setswitchinterval(SWITCH_S)
    logging.getLogger("uvicorn").setLevel(logging.ERROR)  # below are lines that any client can cause
    llm.generate([[0]], SamplingParams(max_tokens=2, ignore_eos=True))
    gc.collect()
    gc.freeze()
    app = create_app(llm, config)
    options = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        http=BoundedProtocol,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=max(1, round(config.drain_timeout_s)),
        ws="none",
    )
    server = _Server(options, ready)
    for each in _STOPS:
        signal.signal(each, server.handle_exit)  # which uvicorn puts back at its end
    try:
        server.run([bound])
    finally:
        for each in _STOPS:
            signal.signal(each, signal.SIG_IGN)
        app.state.service.bridge.end()
