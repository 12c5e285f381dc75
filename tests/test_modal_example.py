"""examples/modal_bench.py as Modal reads it, without an account: its image, its function, its entry point."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

modal = pytest.importorskip("modal", reason="modal is not installed: pip install modal")

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "modal_bench.py"


def load(path: Path = EXAMPLE) -> ModuleType:
    spec = importlib.util.spec_from_file_location("modal_bench", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Recorder:
    """An image that writes down how it was built."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, tuple, dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        def step(*args: Any, **options: Any) -> Recorder:
            self.steps.append((name, args, options))
            return self

        return step


def test_image_holds_what_the_script_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    recorder = Recorder()
    monkeypatch.setattr(modal.Image, "debian_slim", lambda **options: recorder)
    monkeypatch.setattr(modal.App, "function", lambda self, **options: lambda function: function)
    load()
    ((_, (project,), installed),) = (s for s in recorder.steps if s[0] == "pip_install_from_pyproject")
    extras = tomllib.loads(Path(project).read_text())["project"]["optional-dependencies"]
    assert set(installed["optional_dependencies"]) <= set(extras)
    assert {"gpu", "integrations"} <= set(installed["optional_dependencies"])  # `strobe verify` is a step
    copied = {args[1]: Path(args[0]) for name, args, _ in recorder.steps if name.startswith("add_local")}
    assert copied == {"/strobe/src": ROOT / "src", "/strobe/benchmarks/gpu.sh": ROOT / "benchmarks/gpu.sh"}
    assert all(path.exists() for path in copied.values())
    ((_, (environment,), _),) = (step for step in recorder.steps if step[0] == "env")
    assert environment == {"PYTHONPATH": "/strobe/src"}


def test_container_imports_it_without_the_repository(tmp_path: Path) -> None:
    assert load(Path(shutil.copy(EXAMPLE, tmp_path))).app.name == "strobe-bench"


def test_modal_finds_the_entry_point() -> None:
    command = [sys.executable, "-m", "modal", "run", str(EXAMPLE), "--help"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert told.returncode == 0, told.stderr
    for option in ("--gpu", "--prefill-peers", "--decode-peers", "--out"):
        assert option in told.stdout


def test_container_runs_the_script_and_gives_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = load()
    monkeypatch.setattr(example, "RESULTS", tmp_path)
    ran = []

    def fake(command: list[str], *, cwd: Any, check: bool) -> None:
        ran.append((command, str(cwd), check))
        (tmp_path / "prefill.json").write_text("{}")

    monkeypatch.setattr(example.subprocess, "run", fake)
    assert example.measure.local("fa2", "", "abc") == {"prefill.json": b"{}"}
    ((command, folder, check),) = ran
    assert (folder, check) == ("/strobe", False)
    words = command[2:]
    given = dict(zip(words[::2], words[1::2], strict=True))
    assert given == {
        "--prefill-peers": "fa2",
        "--decode-peers": "",
        "--out": str(tmp_path),
        "--commit": "abc",
    }
    known = (ROOT / "benchmarks" / "gpu.sh").read_text()
    assert all(f"{option}" in known for option in given)


def test_files_come_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example = load()
    asked = {}

    class Rented:
        def with_options(self, **options: Any) -> Rented:
            asked.update(options)
            return self

        def remote(self, *args: str) -> dict[str, bytes]:
            asked["args"] = args
            return {"decode.json": json.dumps({"bench": "decode"}).encode()}

    monkeypatch.setattr(example, "measure", Rented())
    monkeypatch.setattr(example.subprocess, "run", lambda *a, **o: subprocess.CompletedProcess(a, 0, "abc\n"))
    example.main(gpu="A100", decode_peers="fa3", out=str(tmp_path / "new"))
    assert asked == {"gpu": "A100", "args": ("fa2,cudnn", "fa3", "abc")}
    assert json.loads((tmp_path / "new" / "decode.json").read_text()) == {"bench": "decode"}
    assert str(tmp_path / "new" / "decode.json") in capsys.readouterr().out
