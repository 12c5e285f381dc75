"""Loads that a server must stand up to, at full scale: a program, run by hand.

    python tests/server/load.py                       every load but the soak, on a server of its own
    python tests/server/load.py soak --seconds 1800   mixed load, with the server's memory

After each load the server must be healthy, idle, and have every KV page free.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import httpx

PATHS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
FIELDS = """
    prompt messages max_tokens temperature top_p top_k min_p n seed stop stop_token_ids logprobs echo
    top_logprobs stream stream_options logit_bias response_format structured_outputs tools tool_choice
    min_tokens ignore_eos presence_penalty repetition_penalty best_of tokens model unknown
""".split()

FAIR: dict[str, list[Any]] = {
    "prompt": ["But soft", [5, 6, 7], ["a", "b"], [[1], [2, 3]]],
    "max_tokens": [1, 9],
    "temperature": [0, 0.7, 2],
    "top_p": [0.1, 1],
    "top_k": [-1, 0, 3],
    "min_p": [0, 0.5],
    "n": [1, 3],
    "seed": [0, -5],
    "stop": ["\n", ["a", "e"]],
    "logprobs": [0, 3, True],
    "echo": [True, False],
    "stream": [True, False],
    "stream_options": [{"include_usage": True}],
    "logit_bias": [{"5": -100, "6": 3.5}],
    "response_format": [{"type": "json_object"}, {"type": "text"}],
    "structured_outputs": [{"regex": "[a-c]{2}"}, {"choice": ["yes", "no"]}, {"json": {"type": "integer"}}],
    "min_tokens": [0, 2],
    "ignore_eos": [True],
    "presence_penalty": [-2, 1.5],
    "repetition_penalty": [0.5, 1.3],
    "model": ["strobe-tiny"],
}


def hostile_body(rng: random.Random) -> tuple[str, bytes]:
    """A path and a body: mostly a good one with something wrong in it, sometimes no JSON at all."""
    path = rng.choice(PATHS)
    good: dict[str, Any] = {
        "/v1/completions": {"prompt": "O Romeo", "max_tokens": 3},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "O"}], "max_tokens": 3},
        "/tokenize": {"prompt": "O"},
        "/detokenize": {"tokens": [5, 6]},
    }[path]
    for _ in range(rng.randint(1, 4)):
        name = rng.choice(FIELDS)
        good[name] = rng.choice(FAIR[name]) if rng.random() < 0.6 and name in FAIR else hostile_value(rng, 3)
    data = json.dumps(good).encode()
    if rng.random() < 0.15:
        cut = rng.randrange(len(data))
        data = data[:cut] + rng.randbytes(rng.randrange(8)) + data[cut + rng.randrange(8) :]
    return path, data


def hostile_value(rng: random.Random, depth: int) -> Any:
    """Any JSON value, of kinds that have broken servers before."""
    kinds: list[Callable[[], Any]] = [
        lambda: None,
        lambda: rng.choice([True, False]),
        lambda: rng.choice([-1, 0, 1, 5, 20, 128, 2047, 2048, 1 << 31, 1 << 63, 1 << 64, 10**30]),
        lambda: rng.choice([0.0, 0.5, 1.0, 2.0, -0.1, 1e308, float("nan"), float("inf"), 5e-324]),
        lambda: rng.choice(
            ["", "a", "\x00", "\ud800", "🙂" * 50, "O " * 400, "<|eos|>", "(", "required", "auto"]
        ),
        lambda: {"type": rng.choice(["json_object", "json_schema", "text", "function"])},
        lambda: {
            "type": "json_schema",
            "json_schema": {"name": "a", "schema": hostile_value(rng, depth - 1)},
        },
        lambda: {"regex": rng.choice(["a+", "(", "[a-z]{1,9}", "(a|b){3}c", "\\", "(?=a)", ".*" * 20])},
        lambda: {"json": {"type": rng.choice(["object", "string", "nope"]), "maxLength": 4}},
        lambda: {"include_usage": hostile_value(rng, 0)},
        lambda: {rng.choice(["type", "1", "30", "a" * 300]): hostile_value(rng, depth - 1)},
        lambda: [hostile_value(rng, depth - 1) for _ in range(rng.randrange(5))],
        lambda: [rng.randrange(-2, 2100) for _ in range(rng.randrange(40))],
        lambda: [{"role": rng.choice(["user", "tool", "x"]), "content": hostile_value(rng, depth - 1)}],
    ]
    return rng.choice(kinds[:5] if depth <= 0 else kinds)()


class Server:
    """A `strobe serve` process, or one that is running elsewhere."""

    def __init__(self, url: str | None, *args: str) -> None:
        self.process = None
        if url is None:
            begun = time.monotonic()
            command = [sys.executable, "-m", "strobe", "serve", "--port", "0", *args]
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            url = self.process.stdout.readline().rsplit(" ", 1)[-1].strip()  # type: ignore[union-attr]
            print(f"ready after {time.monotonic() - begun:.2f} s")
        self.url = url

    def client(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        return httpx.AsyncClient(base_url=self.url, limits=limits, timeout=120)

    def metrics(self) -> dict[str, float]:
        """Every sample, by its name, and by its labels but the model's."""
        lines = httpx.get(f"{self.url}/metrics", timeout=30).text.splitlines()
        lines = [line.replace('{model_name="strobe-tiny"}', "") for line in lines]
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name.removeprefix("strobe:"): float(value) for name, value in pairs}

    def settle(self) -> None:
        """Raise unless the server becomes idle, with all pages free, and is healthy."""
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_pages_used")
        for _ in range(600):
            seen = self.metrics()
            if not any(seen[name] for name in names):
                break
            time.sleep(0.05)
        else:
            raise RuntimeError(f"not idle: { {name: seen[name] for name in names} }")
        if httpx.get(f"{self.url}/health").status_code != 200:
            raise RuntimeError("not healthy")

    def lag(self, before: dict[str, float]) -> str:
        """The p99 of the event loop's lag since `before`, as the bucket that it is in."""
        now, name = self.metrics(), "event_loop_lag_seconds"
        count = now[f"{name}_count"] - before[f"{name}_count"]
        for key, value in now.items():
            if key.startswith(f"{name}_bucket") and value - before[key] >= 0.99 * count:
                return f"event-loop lag p99 <= {key.split(chr(34))[1]} s over {count:.0f} readings"
        raise RuntimeError("no reading of the event loop's lag")

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(60)


async def one_stream(client: httpx.AsyncClient, body: dict[str, Any]) -> str:
    """How a stream ended: "whole", "cut", or its status."""
    async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        if response.status_code != 200:
            return str(response.status_code)
        last = ""
        async for line in response.aiter_lines():
            last = line or last
        return "whole" if last == "data: [DONE]" else "cut"


async def streams(server: Server, count: int, rng: random.Random) -> Counter[str]:
    """All at once; each must end whole or be told 429."""
    async with server.client() as client:
        bodies = [
            {
                "prompt": f"Friend {i}, " * rng.randint(1, 20),
                "max_tokens": rng.randint(8, 64),
                "ignore_eos": True,
            }
            for i in range(count)
        ]
        ended = Counter(await asyncio.gather(*(one_stream(client, body) for body in bodies)))
    if set(ended) - {"whole", "429"}:
        raise RuntimeError(f"some streams ended otherwise: {dict(ended)}")
    return ended


async def disconnects(server: Server, count: int, rng: random.Random, width: int = 100) -> Counter[str]:
    """Clients that leave at random points, `width` at a time, streaming or not."""
    gate = asyncio.Semaphore(width)

    async def visit(client: httpx.AsyncClient, seconds: float, index: int) -> str:
        body = {"prompt": "O " * (1 + index % 60), "max_tokens": 900, "ignore_eos": True, "n": 1 + index % 2}
        work = one_stream(client, body) if index % 3 else client.post("/v1/completions", json=body)
        async with gate:
            try:
                await asyncio.wait_for(work, seconds)
            except (asyncio.TimeoutError, httpx.HTTPError):
                return "left"
            return "answered"

    async with server.client() as client:
        visits = (visit(client, rng.random() * 2, index) for index in range(count))
        return Counter(await asyncio.gather(*visits))


async def fuzz(server: Server, count: int, rng: random.Random, width: int = 16) -> Counter[str]:
    """Hostile bodies; none may be a 500, and every error must have OpenAI's shape."""
    gate = asyncio.Semaphore(width)
    headers = {"content-type": "application/json"}

    async def one(client: httpx.AsyncClient, path: str, data: bytes) -> str:
        async with gate:
            response = await client.post(path, content=data, headers=headers)
        if response.status_code >= 400 and "error" not in response.json():
            raise RuntimeError(f"an error of another shape for {path} {data!r}: {response.text}")
        if response.status_code in (500, 503, 504):
            raise RuntimeError(f"{response.status_code} for {path} {data!r}: {response.text}")
        return str(response.status_code)

    async with server.client() as client:
        bodies = [hostile_body(rng) for _ in range(count)]
        return Counter(await asyncio.gather(*(one(client, *body) for body in bodies)))


async def prefills(server: Server, count: int, rng: random.Random) -> Counter[str]:
    """Long prompts that share nothing, streamed answers beside them."""
    async with server.client() as client:
        long = [{"prompt": rng.choices(range(3, 2048), k=1000), "max_tokens": 2} for _ in range(count)]
        short = [{"prompt": "O", "max_tokens": 100, "ignore_eos": True} for _ in range(8)]
        return Counter(await asyncio.gather(*(one_stream(client, body) for body in (*long, *short))))


async def soak(server: Server, seconds: float, rng: random.Random) -> Counter[str]:
    """All of these in turn, and the server's memory once a minute."""
    end, ended, told = time.monotonic() + seconds, Counter[str](), 0.0
    begun = time.monotonic()
    while time.monotonic() < end:
        ended += await streams(server, rng.randint(1, 80), rng)
        ended += await disconnects(server, 30, rng)
        ended += await fuzz(server, 100, rng)
        await asyncio.to_thread(server.settle)
        if time.monotonic() - told > 60:
            told = time.monotonic()
            memory = server.metrics()["process_resident_memory_bytes"] / (1 << 20)
            print(f"{told - begun:6.0f} s  {memory:7.1f} MiB  {dict(ended)}", flush=True)
    return ended


LOADS: dict[str, tuple[Callable[..., Awaitable[Counter[str]]], int]] = {
    "streams": (streams, 200),
    "disconnects": (disconnects, 1000),
    "prefills": (prefills, 64),
    "fuzz": (fuzz, 10_000),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("loads", nargs="*", metavar=f"{{{','.join(LOADS)},soak}}")
    parser.add_argument("--url", help="a server that runs; without it one is started")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1800)
    given = parser.parse_args()
    if unknown := set(given.loads) - {*LOADS, "soak"}:
        parser.error(f"no such load: {', '.join(unknown)}")
    server, rng = Server(given.url), random.Random(given.seed)
    try:
        for name in given.loads or LOADS:
            before, begun = server.metrics(), time.monotonic()
            load, count = LOADS.get(name, (soak, given.seconds))
            ended = asyncio.run(load(server, count, rng))
            server.settle()
            print(f"{name}: {count} in {time.monotonic() - begun:.1f} s: {dict(ended)}; {server.lag(before)}")
    finally:
        server.stop()


if __name__ == "__main__":
    main()
