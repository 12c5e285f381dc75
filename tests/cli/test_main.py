"""Every mistake on the command line is one line on stderr and exit code 2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.main import get_command

import strobe
from strobe.cli.main import app

from .conftest import Cli

VERBS = sorted(get_command(app).commands)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(cli: Cli, verb: str) -> None:
    outcome = cli(verb, "--help")
    assert outcome.code == 0
    assert f"strobe {verb}" in outcome.out
    assert cli(verb, "-h").out == outcome.out


def test_version(cli: Cli) -> None:
    assert cli("--version").out == f"strobe {strobe.__version__}\n"


@pytest.mark.parametrize("args", [(), ("cache",)])
def test_no_verb_prints_help_and_fails(cli: Cli, args: tuple[str, ...]) -> None:
    outcome = cli(*args)
    assert outcome.code == 2
    assert "Commands" in outcome.out + outcome.err
    assert "error" not in outcome.err


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["explian"], "did you mean 'explain'?"),
        (["nonsense"], "hint: strobe --help"),
        (["cache", "claer"], "did you mean 'clear'?"),
        (["generate", "O", "--max-token", "3"], "did you mean '--max-tokens'?"),
        (["explain", "--zzz"], "hint: strobe explain --help"),
        (["generate", "O", "extra"], "extra"),
        (["generate", "O", "--max-tokens", "many"], "'--max-tokens'"),
        (["generate", "O", "--max-tokens"], "--max-tokens"),
        (["generate", "O", "--prompts", "file"], "--prompts are both given"),
        (["generate", "--prompts", "no/such/file"], "no/such/file: No such file"),
        (["generate", "--prompts", "."], ".: Is a directory"),
        (["generate", "O", "--model", "/no/such/folder"], "/no/such/folder"),
        (["generate", "O", "--device", "tpu"], "--device is 'tpu'; supported: auto, cpu"),
        (["generate", "O", "--kernel", "flsh"], "flsh"),
        (["generate", "O", "--dtype", "int3"], "int3"),
        (["generate", "O", "--temperature", "nan"], "temperature is nan"),
        (["generate", "O", "--max-tokens", "0"], "max_tokens is 0"),
        (["generate", "O", "--max-tokens", "1000000000"], "max_tokens is 1000000000"),
        (["generate", "O", "--top-p", "1.5"], "top_p is 1.5"),
        (["generate", "O", "--kv-cache-gib", "-1"], "kv_cache_gib is -1"),
        (["chat", "--model", "/no/such/folder"], "/no/such/folder"),
        (["verify", "/no/such/folder"], "/no/such/folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistake_is_one_line(cli: Cli, args: list[str], told: str) -> None:
    assert told in cli(*args).error


@pytest.mark.parametrize("variable", ["STROBE_DEVCE", "STROBE_KERNEL"])
def test_bad_setting_stops_every_verb(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, variable: str, tmp_path: Path
) -> None:
    monkeypatch.setenv(variable, "No Such")
    assert variable in cli("env").error
    assert variable in cli("cache", "list").error


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_device_out_of_memory_is_one_line(cli: Cli, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    def exhaust() -> None:
        if device == "cpu":
            torch.empty(1 << 60, dtype=torch.uint8)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB")

    monkeypatch.setattr("strobe.device.machine", exhaust)
    assert "out of memory" in cli("env").error


def test_a_full_disk_is_one_line(process: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    with open("/dev/full", "w") as full:
        done = process("explain", capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (2, "error: No space left on device\n")


def test_a_warning_is_one_line(
    process: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import strobe.device, warnings\n"
        "strobe.device.machine = lambda: warnings.warn('old\\nthing') or exit(0)\n"
    )
    done = process("env", env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.stderr == "warning: old thing\n"


def test_a_bug_keeps_its_traceback(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("strobe.device.machine", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        cli("env")


def test_interrupt_is_quiet(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("strobe.device.machine", interrupt)
    outcome = cli("env")
    assert outcome.code == 130
    assert outcome.err == ""


def test_a_reader_that_leaves_is_not_an_error() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "strobe", "env", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    told = process.stderr.read()
    assert process.wait(timeout=60) == 1
    assert told == b""


@pytest.mark.skipif(sys.platform == "win32", reason="closes streams as a POSIX shell does")
@pytest.mark.parametrize(
    ("closed", "code", "told"),
    [("<&-", 0, ""), (">&-", 2, "error: stdout is closed"), ("<&- >&- 2>&-", 2, ""), ("2>&-", 0, "")],
)
def test_closed_streams(closed: str, code: int, told: str) -> None:
    command = f'"{sys.executable}" -m strobe explain --json {closed}'
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.returncode == code
    assert done.stderr.startswith(told)
    assert len(done.stderr.splitlines()) == bool(told)


def test_env_as_json_and_as_text(cli: Cli) -> None:
    found = json.loads(cli("env", "--json").out)
    assert found["strobe"] == strobe.__version__
    named, _, _ = torch.__version__.partition("+")  # some wheels leave the build out of their metadata
    assert found["versions"]["torch"].partition("+")[0] == named
    text = cli("env").out
    assert found["cpu"]["name"] in text
    for row in found["settings"]:
        assert row["variable"] in text


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_text_that_the_terminal_cannot_show(
    process: Callable[..., subprocess.CompletedProcess[bytes]], model_folder: Path, encoding: str
) -> None:
    flags = ("--model", str(model_folder), "--device", "cpu", "--max-tokens", "40")
    env = {**os.environ, "PYTHONIOENCODING": encoding}
    done = process("generate", "hello", *flags, env=env, text=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode(encoding)
    assert done.stderr.count(b"\n") == 1


def test_input_that_is_no_text(
    process: Callable[..., subprocess.CompletedProcess[bytes]], model_folder: Path
) -> None:
    env = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    for verb in ("generate", "chat"):
        done = process(
            verb, "--model", str(model_folder), "--device", "cpu", env=env, text=False, input=b"\xff\xfe"
        )
        assert done.stderr.startswith(b"error: ")
        assert b"is not utf-8 text" in done.stderr
        assert done.stderr.count(b"\n") == 1


def test_interrupt_of_the_imports_is_quiet(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'typer':\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupt())\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "strobe", "env"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")
