"""A reader's mailbox: what it is told when it is behind, and how it ends."""

from __future__ import annotations

import asyncio
import random
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra `server`")

from strobe.engine.config import EngineConfig
from strobe.engine.request import Metrics, Request, StreamChunk, TokenLogprobs
from strobe.engine.sampling_params import SamplingParams
from strobe.server.bridge import EngineBridge, Stream
from strobe.server.config import ServerConfig
from strobe.server.errors import ApiError
from strobe.server.metrics import Metrics as ServerMetrics

METRICS = Metrics(1, 0, 3, 0.0, 0.0, 0.0, 0.0, 0)


class _Bridge:
    def __init__(self) -> None:
        self.dropped: list[str] = []

    def drop(self, request_id: str) -> None:
        self.dropped.append(request_id)


def _stream(n: int = 1) -> tuple[Stream, _Bridge]:
    bridge: Any = _Bridge()
    return Stream(bridge, [Request("a", (1,), SamplingParams(n=n, max_tokens=8))]), bridge


def _chunk(index: int, token: int, **more: Any) -> StreamChunk:
    return StreamChunk("a", index, f"<{token}>", (token,), (TokenLogprobs(token, -1.0, ()),), **more)


def test_a_reader_that_is_behind_is_told_everything_once_and_in_order() -> None:
    async def play() -> None:
        rng = random.Random()
        stream, _ = _stream(n=3)
        written: dict[int, list[int]] = {0: [], 1: [], 2: []}
        heard: dict[int, list[int]] = {0: [], 1: [], 2: []}
        reads = 0
        for token in range(40):
            index = rng.randrange(3)
            written[index].append(token)
            stream.put(_chunk(index, token))
            if rng.random() < 0.3:
                chunk = await anext(stream)
                reads += 1
                assert chunk.text == "".join(f"<{token}>" for token in chunk.token_ids)
                assert [entry.token_id for entry in chunk.logprobs] == list(chunk.token_ids)
                heard[chunk.index] += chunk.token_ids
        for index in range(3):
            written[index].append(100 + index)
            stream.put(
                _chunk(index, 100 + index, finish_reason="length", metrics=METRICS if index == 2 else None)
            )
        ends = []
        async for chunk in stream:
            reads += 1
            heard[chunk.index] += chunk.token_ids
            ends.append(chunk.finish_reason)
        assert heard == written
        assert ends == ["length"] * 3
        assert reads <= 40

    asyncio.run(play())


def test_the_end_of_the_last_sequence_ends_no_other_early() -> None:
    """The chunk that ends the request may be read before what a sibling said earlier."""

    async def play() -> None:
        stream, _ = _stream(n=2)
        stream.put(_chunk(0, 1))
        stream.put(_chunk(1, 2))
        stream.put(_chunk(1, 3, finish_reason="length"))
        stream.put(_chunk(0, 4, finish_reason="length", metrics=METRICS))
        assert [(chunk.index, chunk.token_ids) async for chunk in stream] == [(0, (1, 4)), (1, (2, 3))]

    asyncio.run(play())


def test_an_error_comes_after_what_was_said_before_it() -> None:
    async def play() -> None:
        stream, bridge = _stream()
        stream.put(_chunk(0, 5))
        stream.fail(ApiError(504, "too late"))
        assert (await anext(stream)).token_ids == (5,)
        with pytest.raises(ApiError, match="too late"):
            await anext(stream)
        assert bridge.dropped == ["a"]
        with pytest.raises(StopAsyncIteration):
            await anext(stream)

    asyncio.run(play())


def test_a_reader_waits_until_there_is_news() -> None:
    async def play() -> None:
        stream, _ = _stream()
        reader = asyncio.create_task(anext(stream))
        await asyncio.sleep(0.01)
        assert not reader.done()
        stream.put(_chunk(0, 7))
        assert (await reader).token_ids == (7,)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(anext(stream), 0.01)

    asyncio.run(play())


def test_the_gap_between_tokens_is_each_sequences_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several tokens in one delivery each has its share of the gap."""
    clock = SimpleNamespace(now=10.0, monotonic=lambda: clock.now)
    monkeypatch.setattr("strobe.server.bridge.time", clock)
    metrics, seen = ServerMetrics("tiny"), []
    monkeypatch.setattr(metrics, "inter_token", SimpleNamespace(observe=seen.append))

    async def play() -> None:
        engine: Any = SimpleNamespace(config=EngineConfig(), check=lambda _: None, add=lambda _: None)
        bridge = EngineBridge(engine, ServerConfig(), metrics)
        monkeypatch.setattr(EngineBridge, "healthy", True)
        bridge.submit([Request("a", (1,), SamplingParams(n=2, max_tokens=8), stream=True)])
        for now, chunks in (
            (10.0, [_chunk(0, 1), _chunk(1, 2)]),
            (10.5, [_chunk(0, 3)]),
            (11.5, [_chunk(0, 4), _chunk(1, 5), _chunk(0, 6), _chunk(1, 7), _chunk(1, 8)]),
        ):
            clock.now = now
            bridge._deliver(chunks)

    asyncio.run(play())
    assert seen == [0.5, 0.5, 0.5, 0.5, 0.5, 0.5]
