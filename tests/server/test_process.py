"""`strobe serve` as a process: one line when ready, drained by a signal, stopped by a second one."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from strobe.cli.main import run

LONG = {"prompt": "O", "max_tokens": 400, "ignore_eos": True, "stream": True}
MANY = {**LONG, "max_tokens": 1000, "n": 100}


class Process:
    def __init__(self, *args: str) -> None:
        command = [sys.executable, "-m", "strobe", "serve", "--port", "0", *args]
        env = {**os.environ, "PYTHONUNBUFFERED": "1"}
        self.popen = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
        )
        self.line = self.popen.stdout.readline()
        self.url = self.line.rsplit(" ", 1)[-1].strip()

    def end(self) -> tuple[int, str, str]:
        out, err = self.popen.communicate(timeout=30)
        return self.popen.returncode, out, err


@pytest.fixture
def start() -> Iterator:
    started: list[Process] = []

    def begin(*args: str) -> Process:
        started.append(Process(*args))
        return started[-1]

    yield begin
    for process in started:
        process.popen.kill()
        process.popen.communicate()


def test_a_signal_drains(start) -> None:
    process = start("--served-model-name", "bard", "--max-num-seqs", "8")
    assert process.line == f"strobe-tiny is served on {process.url}\n"
    with httpx.Client(base_url=process.url, timeout=60) as client:
        assert client.get("/v1/models").json()["data"][0]["id"] == "bard"
        with client.stream("POST", "/v1/completions", json=LONG) as answer:
            chunks = answer.iter_lines()
            next(chunks)
            process.popen.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            with pytest.raises(httpx.HTTPError):
                httpx.get(f"{process.url}/health")
            lines = [line for line in chunks if line]
    assert lines[-1] == "data: [DONE]"
    assert json.loads(lines[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert process.end() == (0, "", "")


def test_a_second_signal_stops(start) -> None:
    process = start("--drain-timeout", "120")
    with httpx.stream("POST", f"{process.url}/v1/completions", json=MANY, timeout=60) as answer:
        chunks = answer.iter_lines()  # kept: a client that drops it hangs up
        next(chunks)
        for _ in range(2):
            process.popen.send_signal(signal.SIGTERM)
            time.sleep(0.3)
        begun = time.monotonic()
        process.popen.wait(20)
    assert time.monotonic() - begun < 15
    assert process.end() == (0, "", "")


def test_a_late_signal_kills_nothing(start) -> None:
    process = start()
    for _ in range(40):
        process.popen.send_signal(signal.SIGTERM)
        time.sleep(0.02)
    assert process.end() == (0, "", "")


def test_the_drain_has_an_end(start) -> None:
    process = start("--drain-timeout", "1")
    with httpx.stream("POST", f"{process.url}/v1/completions", json=MANY, timeout=60) as answer:
        chunks = answer.iter_lines()
        next(chunks)
        process.popen.send_signal(signal.SIGINT)
        process.popen.wait(20)
    code, _, err = process.end()
    assert code == 0
    assert "Traceback" not in err


def test_what_cannot_be_served_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        empty = tmp_path / "keys"
        empty.write_text("\n")
        for args, told in (
            (("--port", port), "Address already in use"),
            (("--host", "203.0.113.7"), "cannot listen on 203.0.113.7"),
            (("--port", "70000"), "port is 70000"),
            (("--max-queue", "0"), "max_queue is 0"),
            (("--api-key", ""), "an API key is empty"),
            (("--api-key-file", str(empty)), "holds no key"),
            (("--api-key-file", str(tmp_path / "none")), "No such file"),
            (("--port", "0", "--max-model-len", "5000"), "the model's context is 1024"),
            (("--prot", "0"), "did you mean"),
        ):
            with pytest.raises(SystemExit) as ended:
                run(["serve", *args])
            captured = capsys.readouterr()
            (line,) = captured.err.splitlines()
            assert (ended.value.code, captured.out) == (2, "")
            assert told in line


def test_keys_from_a_file(start, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("one\ntwo\n")
    process = start("--api-key-file", str(keys), "--api-key", "three")
    for key, status in (("one", 200), ("two", 200), ("three", 200), ("four", 401)):
        headers = {"authorization": f"Bearer {key}"}
        assert httpx.get(f"{process.url}/version", headers=headers).status_code == status


def test_help_is_grouped() -> None:
    done = subprocess.run([sys.executable, "-m", "strobe", "serve", "--help"], capture_output=True, text=True)
    for word in (
        "Model",
        "Address",
        "Load",
        "Safety",
        "--max-num-seqs",
        "--max-num-batched-tokens",
        "--api-key",
    ):
        assert word in done.stdout
