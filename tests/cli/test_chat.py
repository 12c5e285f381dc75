"""Chat through a pipe, and through a terminal where Ctrl-C matters."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .conftest import Cli

MAX_TOKENS = 2000
"""Of bytes; the test's model takes seconds for so many."""

pty = pytest.importorskip("pty", reason="pseudo-terminals are a thing of Unix")


def test_conversation_is_kept_saved_and_reset(cli: Cli, model_folder: Path, tmp_path: Path) -> None:
    first, second, third = (tmp_path / f"{n}.json" for n in (1, 2, 3))
    lines = ["hi", f"/save {first}", "again", f"/save {second}", "/reset", f"/save {third}", "/exit", "never"]
    flags = ["--model", str(model_folder), "--device", "cpu", "--max-tokens", "4", "--system", "be brief"]
    outcome = cli("chat", *flags, stdin="\n".join(lines))
    assert outcome.code == 0
    saved = [json.loads(path.read_text()) for path in (first, second, third)]
    assert [m["role"] for m in saved[0]] == ["system", "user", "assistant"]
    assert [m["role"] for m in saved[1]] == ["system", "user", "assistant", "user", "assistant"]
    assert saved[1][:3] == saved[0]
    assert saved[2] == [{"role": "system", "content": "be brief"}]
    assert [m["content"] for m in saved[1] if m["role"] == "user"] == ["hi", "again"]
    assert outcome.out == "".join(m["content"] + "\n" for m in saved[1] if m["role"] == "assistant")


def test_mistakes_do_not_end_the_chat(cli: Cli, model_folder: Path, tmp_path: Path) -> None:
    there = tmp_path / "there.json"
    there.write_text("mine")
    lines = ["/sve x", "/nonsense", "/save", f"/save {there}", f"/save {tmp_path}/no/such/folder.json"]
    lines += ["x" * 3000, "/help", f"/save {tmp_path}/end.json"]
    outcome = cli("chat", "--model", str(model_folder), "--device", "cpu", stdin="\n".join(lines))
    assert outcome.code == 0
    assert "did you mean '/save'?" in outcome.err
    assert "unknown command /nonsense" in outcome.err
    assert "/save needs a file" in outcome.err
    assert "File exists" in outcome.err
    assert "No such file" in outcome.err
    assert "this model's context is 2048" in outcome.err
    assert there.read_text() == "mine"
    assert json.loads((tmp_path / "end.json").read_text()) == []


def test_a_model_that_cannot_chat(cli: Cli, model_folder: Path, tmp_path: Path) -> None:
    for path in model_folder.iterdir():
        if path.name != "tokenizer_config.json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    assert "no chat template" in cli("chat", "--model", str(tmp_path), "--device", "cpu", stdin="hi").error


class Terminal:
    """A chat in a pseudo-terminal."""

    def __init__(self, folder: Path) -> None:
        self.fd, child = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "strobe", "chat", "-m", str(folder), "--max-tokens", str(MAX_TOKENS)],
            stdin=child,
            stdout=child,
            stderr=child,
            start_new_session=True,
            preexec_fn=self._as_started_by_a_script,
        )
        os.close(child)
        self.seen = ""

    @staticmethod
    def _as_started_by_a_script() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        os.nice(19)  # on a busy machine the test keeps up with what it reads

    def until(self, text: str, since: int = 0) -> None:
        """Read on until `text` stands in what came after `since`."""
        self._read_while(lambda: text not in self.seen[since:])

    def until_more(self, length: int) -> None:
        self._read_while(lambda: len(self.seen) < length)

    def _read_while(self, wanting: Callable[[], bool]) -> None:
        os.set_blocking(self.fd, False)
        end = time.monotonic() + 60
        while wanting():
            assert time.monotonic() < end, self.seen
            try:
                self.seen += os.read(self.fd, 65536).decode(errors="replace")
            except BlockingIOError:
                time.sleep(0.02)

    def type(self, line: str) -> None:
        os.write(self.fd, line.encode())


@pytest.fixture
def terminal(model_folder: Path) -> Iterator[Terminal]:
    opened = Terminal(model_folder)
    yield opened
    opened.process.kill()
    opened.process.wait()
    os.close(opened.fd)


def test_ctrl_c_stops_the_answer_and_ctrl_d_leaves(terminal: Terminal, tmp_path: Path) -> None:
    terminal.until("> ")
    saved, start = tmp_path / "chat.json", len(terminal.seen)
    terminal.type("hello\n")
    terminal.until("hello\r\n", start)
    start = len(terminal.seen)
    terminal.until_more(start + 20)
    terminal.process.send_signal(signal.SIGINT)
    terminal.until("\n> ", start)
    terminal.type(f"/save {saved}\n")
    terminal.until("2 messages saved", start)
    user, assistant = json.loads(saved.read_text())
    assert user == {"role": "user", "content": "hello"}
    assert 0 < len(assistant["content"]) < MAX_TOKENS / 4
    # a Ctrl-D typed before the next prompt is there may be lost as the terminal changes its mode
    terminal.until("> ", terminal.seen.index("2 messages saved", start))
    terminal.type("\x04")
    assert terminal.process.wait(timeout=60) == 0
