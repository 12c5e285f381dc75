"""Keys, host names, origins, ids, and who may share a cached prefix."""

from __future__ import annotations

import logging

import openai
import pytest

from strobe.server.config import ServerConfig

from .conftest import LiveServer

KEYS = ServerConfig(api_keys=("first-key", "second-key"))


def routes_of(server: LiveServer) -> list[tuple[str, str]]:
    routes = [
        (method, route.path) for route in server.uvicorn.config.app.routes for method in route.methods or ()
    ]
    assert len(routes) > 10
    return routes


def test_every_route_but_health_wants_a_key(serve) -> None:
    server = serve(KEYS)
    with server.http() as client:
        for method, path in [*routes_of(server), ("GET", "/nothing"), ("OPTIONS", "/v1/models")]:
            for headers in (
                {},
                {"authorization": "Bearer wrong"},
                {"authorization": "Bearer first-key-and-more"},
                {"authorization": "Bearer"},
                {"authorization": "first-key"},
                {"authorization": "Basic !!!"},
                {"authorization": "Bearer ключ".encode()},
            ):
                response = client.request(method, path, headers=headers)
                if path == "/health":
                    assert response.status_code in (200, 405)
                else:
                    assert response.status_code == 401, (method, path)
                    assert response.headers["www-authenticate"].startswith(("Bearer", "Basic"))
        for key in KEYS.api_keys:
            assert client.get("/version", headers={"authorization": f"Bearer {key}"}).status_code == 200
        assert client.get("/", auth=("anyone", "first-key")).status_code == 200
    with pytest.raises(openai.AuthenticationError):
        server.client(api_key="wrong").models.list()
    assert server.client(api_key="second-key").models.list().data


def test_clients_of_different_keys_share_no_prefix(serve) -> None:
    server = serve(KEYS)
    prompt = list(range(100, 180))

    def cached(key: str) -> int:
        answer = server.client(api_key=key).completions.create(
            model="strobe-tiny", prompt=prompt, max_tokens=1
        )
        return answer.usage.prompt_tokens_details.cached_tokens

    assert cached("first-key") == 0
    assert cached("first-key") == 64
    assert cached("second-key") == 0
    assert cached("second-key") == 64


def test_loopback_without_keys_answers_to_its_own_names_alone(serve) -> None:
    server = serve(ServerConfig(allowed_hosts=("chat.example",)))
    port = server.url.rsplit(":", 1)[1]
    with server.http() as client:
        for host in (f"127.0.0.1:{port}", "localhost", f"LOCALHOST:{port}", f"[::1]:{port}", "chat.example"):
            assert client.get("/version", headers={"host": host}).status_code == 200
        for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "", "[::2]:80"):
            assert client.get("/version", headers={"host": host}).status_code == 403


def test_cors_is_off_until_asked_for(idle: LiveServer, serve) -> None:
    asking = {"origin": "https://a.example", "access-control-request-method": "POST"}
    with idle.http() as client:
        response = client.get("/version", headers=asking)
        assert not [name for name in response.headers if name.startswith("access-control")]
        assert client.options("/v1/completions", headers=asking).status_code == 405
    with serve(ServerConfig(allowed_origins=("https://a.example",), api_keys=("k",))).http() as client:
        allowed = client.options("/v1/completions", headers=asking)
        assert allowed.headers["access-control-allow-origin"] == "https://a.example"
        other = client.options("/v1/completions", headers={**asking, "origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers


def test_request_ids(idle: LiveServer) -> None:
    with idle.http() as client:
        given = client.get("/version", headers={"x-request-id": "abc-DEF_123"})
        assert given.headers["x-request-id"] == "abc-DEF_123"
        for bad in ("a" * 65, "a b", "x\ty", "<script>"):
            assert client.get("/version", headers={"x-request-id": bad}).headers["x-request-id"] != bad
        ids = {client.get("/version").headers["x-request-id"] for _ in range(10)}
    assert len(ids) == 10
    twice = [idle.post("/v1/completions", {"prompt": "O"}, **{"x-request-id": "same"}) for _ in range(2)]
    assert twice[0].json()["id"] != twice[1].json()["id"]


@pytest.mark.parametrize("told", [False, True])
def test_prompts_stay_out_of_the_log_unless_asked_for(serve, caplog, told) -> None:
    caplog.set_level(logging.DEBUG, logger="strobe.server")
    server = serve(ServerConfig(log_prompts=told))
    text = "a most private matter"
    server.post("/v1/completions", {"prompt": text, "max_tokens": 2})
    server.post("/v1/chat/completions", {"messages": [{"role": "tool", "content": text}]})
    assert (
        text in "".join(record.getMessage() for record in caplog.records if "httpx" not in record.name)
    ) == told


def test_metrics_take_no_label_from_a_client(idle: LiveServer) -> None:
    with idle.http() as client:
        for path in ("/made/up", "/v1/models/made-up", "/%0a"):
            client.get(path)
        assert "made" not in client.get("/metrics").text


def test_metrics_carry_the_models_name(serve) -> None:
    """vLLM's dashboards choose by this label."""
    server = serve(ServerConfig(served_names=('tiny "}', "other")))
    server.post("/v1/completions", {"prompt": "O", "max_tokens": 2, "stream": True})
    lines = server.http().get("/metrics").text.splitlines()
    named = {line.partition("{")[0] for line in lines if 'model_name="tiny \\"}"' in line}
    for name in (
        "num_requests_running",
        "kv_cache_usage_perc",
        "request_success_total",
        "prompt_tokens_total",
    ):
        assert f"strobe:{name}" in named
    for name in ("time_to_first_token", "request_prefill_time", "request_decode_time", "inter_token_latency"):
        assert server.metric(f"strobe:{name}_seconds_count") == 1
        assert f"strobe:{name}_seconds_bucket" in named


def test_the_page_loads_nothing_from_elsewhere(idle: LiveServer) -> None:
    with idle.http() as client:
        response = client.get("/")
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "connect-src 'self'" in policy
