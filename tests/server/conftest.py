"""Live servers: a real socket, a real event loop in a thread, the bundled model."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import uvicorn
from openai import OpenAI

from strobe.checkpoints.load import Checkpoint, load
from strobe.engine import LLM, EngineConfig
from strobe.engine.engine import Engine
from strobe.server.app import create_app
from strobe.server.config import ServerConfig
from strobe.server.listen import bind, url_of
from strobe.server.protocol import BoundedProtocol
from strobe.server.service import Service


@dataclasses.dataclass
class LiveServer:
    url: str
    service: Service
    uvicorn: uvicorn.Server

    @property
    def engine(self) -> Engine:
        return self.service.llm.engine

    def client(self, *, strict: bool = True, **options: Any) -> OpenAI:
        given = {"api_key": "none", "max_retries": 0, "timeout": 60, **options}
        return OpenAI(base_url=f"{self.url}/v1", _strict_response_validation=strict, **given)

    def http(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, **{"timeout": 60, **options})

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        with self.http() as client:
            return client.post(path, json=body, headers=headers)

    def metric(self, name: str) -> float:
        """The sum of a metric's samples."""
        with self.http() as client:
            lines = client.get("/metrics").text.splitlines()
        return sum(
            float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0].split(" ")[0] == name
        )

    def settle(self, seconds: float = 10.0) -> None:
        """Wait until nothing runs, then hold the cache to its law: every page is free."""
        end = time.monotonic() + seconds
        while self.engine.has_work or self.service.bridge.waiting:
            assert time.monotonic() < end, self.engine.stats()
            time.sleep(0.01)
        self.engine.scheduler.check()
        assert self.engine.stats().used_pages == 0


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    """The JSON of a stream's events; the last one must be [DONE]."""
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


@pytest.fixture(scope="session")
def bundled() -> Checkpoint:
    return load(None, device="cpu")


@pytest.fixture(scope="session")
def llm_with(bundled: Checkpoint) -> Callable[..., LLM]:
    """`llm_with(max_num_seqs=4)`: the bundled weights, loaded once, under an engine of its own."""

    def build(**options: Any) -> LLM:
        llm = LLM.__new__(LLM)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("strobe.engine.llm.load", lambda *args, **kwargs: bundled)
            llm.__init__(config=EngineConfig(**{"max_num_seqs": 64, "kv_cache_pages": 1024, **options}))
        return llm

    return build


@contextmanager
def running(llm: LLM, config: ServerConfig) -> Iterator[LiveServer]:
    with bind(config) as bound:
        app = create_app(llm, config)
        options = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=1,
            ws="none",
            http=BoundedProtocol,
        )
        server = uvicorn.Server(options)
        thread = threading.Thread(target=server.run, args=([bound],), daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.005)
        try:
            yield LiveServer(url_of(bound), app.state.service, server)
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


@pytest.fixture
def serve(llm_with: Callable[..., LLM]) -> Iterator[Callable[..., LiveServer]]:
    """`serve(ServerConfig(...), max_num_seqs=2)` starts a server that ends with the test."""
    from contextlib import ExitStack

    with ExitStack() as stack:

        def start(config: ServerConfig | None = None, **engine: Any) -> LiveServer:
            config = dataclasses.replace(config or ServerConfig(), port=0)
            return stack.enter_context(running(llm_with(**engine), config))

        yield start


@pytest.fixture(scope="session")
def server(llm_with: Callable[..., LLM]) -> Iterator[LiveServer]:
    """One server that tests share, which they leave idle."""
    with running(llm_with(), ServerConfig(port=0)) as live:
        yield live


@pytest.fixture
def idle(server: LiveServer) -> Iterator[LiveServer]:
    """The shared server; after the test every page of it must be free."""
    yield server
    server.settle()
