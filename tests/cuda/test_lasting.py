"""Memory that lasts is taken on the default stream, and by a thread whose allocations nobody redirects."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident

import pytest
import torch

from strobe.cuda.lasting import lasting


class Stream:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


@pytest.mark.parametrize("name", ["default", "side"])
def test_made_on_the_default_stream(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    default = Stream("default", log)
    current = [default if name == "default" else Stream(name, log)]

    @contextmanager
    def within(stream: Stream) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: default)
    monkeypatch.setattr(torch.cuda, "stream", within)

    threads = []

    def make() -> torch.Tensor:
        threads.append(get_ident())
        log.append(f"made on {current[-1].name}")
        return torch.ones(3)

    assert lasting(make, 0).tolist() == [1, 1, 1]
    assert log == ["made on default", *([] if name == "default" else ["side waits for default"])]
    assert current[-1].name == name
    assert (threads == [get_ident()]) is (name == "default")
