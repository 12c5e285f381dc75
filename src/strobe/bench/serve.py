"""Times an OpenAI server under open-loop load: requests come when they come, whoever still waits.

Latencies count from the moment a request was due, not from when this process got round to sending it,
so that a server that stalls is charged for all who queue up behind the stall.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import statistics
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from strobe.bench.results import Row
from strobe.errors import StrobeError

PERCENTILES = (50, 90, 99)
OBJECTIVES = ("ttft", "tpot", "e2e")
WARM_UPS = 3
_FIRST_TOKEN = 3
"""Ids below it are often special tokens."""


@dataclass(frozen=True)
class Workload:
    """`requests` prompts of random tokens, due at random (Poisson) times at `rate` a second.

    `prompt` and `output` are the shortest and longest length in tokens, drawn evenly between. Token ids
    are from 3 to below `vocab`.
    """

    rate: float
    requests: int = 100
    prompt: tuple[int, int] = (16, 128)
    output: tuple[int, int] = (16, 128)
    vocab: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.rate > 0:
            raise StrobeError(f"rate is {self.rate}; supported: over 0, inf for all at once")
        if not 1 <= self.requests <= 1_000_000:
            raise StrobeError(f"requests is {self.requests}; supported: 1 to 1000000")
        if self.vocab <= _FIRST_TOKEN:
            raise StrobeError(f"vocab is {self.vocab}; supported: over {_FIRST_TOKEN}")
        for name in ("prompt", "output"):
            low, high = getattr(self, name)
            if not 1 <= low <= high:
                raise StrobeError(f"{name} lengths {low} to {high}; supported: 1 and up, the shortest first")

    def draw(self) -> list[tuple[float, list[int], int]]:
        """For each request: when it is due in seconds, its prompt, its output's length.

        Prompts and lengths do not depend on the rate.
        """
        arrivals, work = random.Random(self.seed), random.Random(self.seed)  # noqa: S311 - a benchmark's
        due, drawn = 0.0, []
        for _ in range(self.requests):
            prompt = [work.randrange(_FIRST_TOKEN, self.vocab) for _ in range(work.randint(*self.prompt))]
            drawn.append((due, prompt, work.randint(*self.output)))
            due += 0.0 if math.isinf(self.rate) else arrivals.expovariate(self.rate)
        return drawn


@dataclass
class Answer:
    """What became of one request. Times are seconds after it was due."""

    wanted: int
    status: int = 0
    """The HTTP status; 0 where the connection broke."""
    whole: bool = False
    ttft: float = 0.0
    e2e: float = 0.0
    tokens: int = 0
    late: float = 0.0
    """How late this process sent it."""
    gaps: list[float] = field(default_factory=list)
    """Between chunks of text."""

    @property
    def tpot(self) -> float:
        return (self.e2e - self.ttft) / (self.tokens - 1) if self.tokens > 1 else 0.0


@dataclass(frozen=True)
class Target:
    """An OpenAI server: `url` without /v1. Its model is asked for where it is not named.

    `ignore_eos` makes every output as long as drawn; servers that do not know the field refuse it.
    """

    url: str
    model: str | None = None
    api_key: str | None = None
    ignore_eos: bool = True
    timeout_s: float = 600.0

    def client(self) -> httpx.AsyncClient:
        headers = {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        base = self.url.rstrip("/").removesuffix("/v1")
        return httpx.AsyncClient(base_url=base, headers=headers, limits=limits, timeout=self.timeout_s)


def measure(
    target: Target,
    workloads: Sequence[Workload],
    *,
    provider: str = "strobe",
    objectives: Mapping[str, float] | None = None,
    on_answer: Callable[[], object] | None = None,
) -> list[Row]:
    """A row a workload; `objectives` are seconds by name ("ttft", "tpot", "e2e") for the goodput.

    Raises:
        StrobeError: nobody answers at the URL, or the server refuses the requests.
    """
    return asyncio.run(_measure(target, workloads, provider, objectives or {}, on_answer))


async def _measure(
    target: Target,
    workloads: Sequence[Workload],
    provider: str,
    objectives: Mapping[str, float],
    on_answer: Callable[[], object] | None,
) -> list[Row]:
    async with target.client() as client:
        model = target.model or await _first_model(client)
        await _warm_up(client, target, model, workloads[0])
        rows = []
        for workload in workloads:
            begun = time.perf_counter()
            answers = await _run(client, target, model, workload, on_answer)
            elapsed = time.perf_counter() - begun
            rows.append(summary(model, workload, answers, elapsed, provider=provider, objectives=objectives))
        return rows


async def _first_model(client: httpx.AsyncClient) -> str:
    try:
        response = await client.get("/v1/models")
        response.raise_for_status()
        return response.json()["data"][0]["id"]
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        raise StrobeError(
            f"{client.base_url} lists no models: {str(error) or type(error).__name__}",
            hint="is it running? --model NAME asks for none",
        ) from error


async def _warm_up(client: httpx.AsyncClient, target: Target, model: str, workload: Workload) -> None:
    """A few requests, one after another; the first refusal is told in the server's words."""
    for _, prompt, output in workload.draw()[:WARM_UPS]:
        answer = Answer(output)
        body = _body(target, model, prompt, output)
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                await response.aread()
                raise StrobeError(f"{client.base_url} refuses: {response.status_code} {response.text[:300]}")
            await _read(response, answer, time.perf_counter())
        if target.ignore_eos and answer.tokens != output:
            raise StrobeError(f"{output} tokens were asked for, {answer.tokens} came")


async def _run(
    client: httpx.AsyncClient,
    target: Target,
    model: str,
    workload: Workload,
    on_answer: Callable[[], object] | None,
) -> list[Answer]:
    begun = time.perf_counter()

    async def one(due: float, prompt: list[int], output: int) -> Answer:
        answer = Answer(output)
        await asyncio.sleep(begun + due - time.perf_counter())
        answer.late = time.perf_counter() - begun - due
        body = _body(target, model, prompt, output)
        try:
            async with client.stream("POST", "/v1/completions", json=body) as response:
                answer.status = response.status_code
                if response.status_code == 200:
                    await _read(response, answer, begun + due)
        except httpx.HTTPError:
            answer.status = 0
        if on_answer is not None:
            on_answer()
        return answer

    return await asyncio.gather(*(one(*request) for request in workload.draw()))


def _body(target: Target, model: str, prompt: list[int], output: int) -> dict[str, Any]:
    body = {"model": model, "prompt": prompt, "max_tokens": output, "temperature": 0.0, "stream": True}
    body["stream_options"] = {"include_usage": True}
    return body | ({"ignore_eos": True} if target.ignore_eos else {})


async def _read(response: httpx.Response, answer: Answer, due: float) -> None:
    last = 0.0
    async for event in _events(response):
        now = time.perf_counter() - due
        if event is None:
            answer.whole = True
            break
        if usage := event.get("usage"):
            answer.tokens = usage["completion_tokens"]
        if event.get("choices"):
            if last:
                answer.gaps.append(now - last)
            else:
                answer.ttft = now
            last = answer.e2e = now


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any] | None]:
    """A stream's JSON objects; None for [DONE]."""
    async for line in response.aiter_lines():
        if line.startswith("data:"):
            data = line[5:].strip()
            yield None if data == "[DONE]" else json.loads(data)


def summary(
    model: str,
    workload: Workload,
    answers: Sequence[Answer],
    elapsed: float,
    *,
    provider: str,
    objectives: Mapping[str, float],
) -> Row:
    """One row of results. `checked`: every answer that came was whole, and as long as asked for."""
    done = [answer for answer in answers if answer.whole and answer.tokens]
    good = [a for a in done if all(getattr(a, name) <= limit for name, limit in objectives.items())]
    refused = sum(answer.status == 429 for answer in answers)
    row: Row = {
        "case": {
            "model": model,
            "rate": "inf" if math.isinf(workload.rate) else workload.rate,
            "requests": workload.requests,
            "prompt": list(workload.prompt),
            "output": list(workload.output),
        },
        "provider": provider,
        "checked": all(a.tokens == a.wanted for a in done) and len(done) + refused == len(answers),
        "completed": len(done),
        "refused": refused,
        "failed": len(answers) - len(done) - refused,
        "duration_s": elapsed,
        "req_s": len(done) / elapsed,
        "tok_s": sum(answer.tokens for answer in done) / elapsed,
        "client_late_ms": 1e3 * max(answer.late for answer in answers),
    }
    if objectives:
        row["objectives_ms"] = {name: 1e3 * limit for name, limit in objectives.items()}
        row["goodput_req_s"] = len(good) / elapsed
    for name in OBJECTIVES:
        row |= _spread(f"{name}_ms", [1e3 * getattr(answer, name) for answer in done])
    return row | _spread("itl_ms", [1e3 * gap for answer in done for gap in answer.gaps])


def _spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """Mean and percentiles; nothing where there are no values."""
    if not values:
        return {}
    ordered = sorted(values)
    ranks = {p: ordered[min(len(ordered) - 1, math.ceil(p / 100 * len(ordered)) - 1)] for p in PERCENTILES}
    return {name: statistics.fmean(values), **{f"{name}_p{p}": value for p, value in ranks.items()}}
