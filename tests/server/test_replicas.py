"""Two replicas on Ray Serve: requests spread, alike ones stay together, a killed replica is replaced."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

ray = pytest.importorskip("ray", reason="needs Ray Serve: pip install 'strobe[ray]'")

EXAMPLE = Path(__file__).parents[2] / "examples" / "ray_serve.yaml"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    import yaml
    from ray import serve

    from strobe.server.replicas import build

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (application,) = yaml.safe_load(EXAMPLE.read_text())["applications"]
    assert application["import_path"] == "strobe.server.replicas:build"
    small = {"max_replicas": 2, "num_cpus": 0.1, "engine": {"max_num_seqs": 16, "kv_cache_pages": 512}}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(build({**application["args"], **small}), name="strobe")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


def complete(url: str, prompt: str, **more: object) -> httpx.Response:
    body = {"prompt": prompt, "max_tokens": 6, "ignore_eos": True, **more}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=60)


def replicas_of(url: str) -> set[str]:
    """Those that answer; prompts that share nothing go to all."""
    return {complete(url, secrets.token_hex(20)).headers["x-replica"] for _ in range(16)}


def test_requests_spread_and_alike_ones_stay_together(url: str) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda i: complete(url, secrets.token_hex(20), seed=i), range(40)))
    assert all(answer.status_code == 200 for answer in answers)
    spread = Counter(answer.headers["x-replica"] for answer in answers)
    assert len(spread) == 2
    assert min(spread.values()) >= 5
    alike = [complete(url, "But soft, what light through yonder window breaks? " * 4) for _ in range(6)]
    assert len({answer.headers["x-replica"] for answer in alike}) == 1
    assert alike[-1].json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


def test_every_route_streams_refuses_and_names_its_request(url: str) -> None:
    streamed = complete(url, "O", stream=True)
    assert streamed.text.endswith("data: [DONE]\n\n")
    refused = complete(url, "O", n=0)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "n")
    assert refused.headers["x-request-id"] == refused.json()["error"]["request_id"]
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{url}/").headers["content-type"].startswith("text/html")
    assert httpx.get(f"{url}/nothing").status_code == 404
    large = httpx.post(f"{url}/tokenize", json={"prompt": "a" * (3 << 20)})
    assert large.status_code == 413


def used_pages(url: str) -> dict[str, float]:
    """Pages in use, by replica; scraped until both have answered."""
    seen: dict[str, float] = {}
    for index in range(60):
        answer = httpx.get(f"{url}/metrics", params={"spread": index})
        name = "strobe:kv_cache_pages_used{"
        (value,) = (line for line in answer.text.splitlines() if line.startswith(name))
        seen[answer.headers["x-replica"]] = float(value.rpartition(" ")[2])
    return seen


def test_a_client_that_leaves_frees_its_pages(url: str) -> None:
    body = {"prompt": "O", "max_tokens": 1000, "ignore_eos": True, "stream": True}
    for _ in range(4):
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
            next(answer.iter_lines())
    end = time.monotonic() + 20
    while any(used_pages(url).values()):
        assert time.monotonic() < end, used_pages(url)


def test_a_killed_replica_loses_its_running_requests_alone(url: str) -> None:
    before = replicas_of(url)
    assert len(before) == 2
    body = {"prompt": "O", "max_tokens": 1000, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as lost:
        lines = lost.iter_lines()
        next(lines)
        victim = lost.headers["x-replica"]
        actors = ray.util.list_named_actors(all_namespaces=True)
        (name,) = (actor["name"] for actor in actors if actor["name"].endswith(victim))
        ray.kill(ray.get_actor(name, namespace="serve"), no_restart=False)
        told: list[str] = []
        with contextlib.suppress(httpx.HTTPError):
            told.extend(lines)
        assert "data: [DONE]" not in told
    statuses = Counter(complete(url, secrets.token_hex(20)).status_code for _ in range(20))
    assert statuses[200] >= 19  # one may be on its way to the dead one
    end = time.monotonic() + 60
    while len(now := replicas_of(url)) < 2:
        assert time.monotonic() < end, now
        time.sleep(1)
    assert victim not in now
