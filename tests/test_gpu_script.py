"""benchmarks/*.sh and tests/gpu/run.py: commands are understood, deadlines hold, counts add up."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.main import get_command

from strobe.bench.results import Result
from strobe.cli.main import app

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"


def run(tmp_path: Path, fake: str, *args: str) -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
    """The script with a `python3` that keeps its words and then does `fake`; and the words of each call."""
    python, log = tmp_path / "python3", tmp_path / "log"
    keep = f'{{ printf "%s\\0" "$@"; printf "\\001\\0"; }} >> {shlex.quote(str(log))}'
    python.write_text(f"#!/bin/sh\n{keep}\n{fake}\n")
    python.chmod(0o755)
    environ = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["sh", str(SCRIPT), *args], env=environ, capture_output=True, text=True, timeout=60)
    calls = log.read_text().split("\001\0")[:-1] if log.exists() else []
    return done, [call.split("\0")[:-1] for call in calls]


def parsed(words: list[str]) -> tuple[str, dict[str, Any]]:
    """The verb and the parameters of a `python3 -m strobe ...`; fails where strobe does not understand it."""
    assert words[:2] == ["-m", "strobe"]
    command, args, verb = get_command(app), words[2:], []
    while hasattr(command, "commands"):
        verb.append(args[0])
        command = command.commands[args.pop(0)]
    return " ".join(verb), command.make_context("strobe", args).params


@pytest.mark.parametrize("quick", [False, True], ids=["full", "quick"])
def test_every_command_is_understood(tmp_path: Path, quick: bool) -> None:
    out = tmp_path / "out"
    flags = ["--out", str(out), "--commit", "abc", "--prefill-peers", "fa2,fa3", "--decode-peers", "fa3"]
    flags += ["--engine-peers", "vllm", "--engine", "graphs=true overlap=true"]
    flags += ["--quick"] if quick else []
    done, calls = run(tmp_path, "", *flags)
    assert done.returncode == 0, done.stderr
    saved: dict[str, set[str]] = {}
    chosen = ["graphs=true", "overlap=true"]
    for words in calls:
        verb, params = parsed(words)
        if verb == "cache warm":
            continue
        assert params["commit"] == "abc"
        assert params["save"].parent == out
        if verb in ("bench engine", "bench profile", "bench soak", "verify"):
            assert params["engine"] in (chosen, ["deterministic=true", *chosen])
        saved.setdefault(params["save"].stem, set()).add(verb)
    assert saved == {
        "decode": {"bench decode"}, "decode_dense": {"bench decode"}, "append": {"bench decode"},
        "engine": {"bench engine"}, "profile": {"bench profile"},
        "prefill": {"bench attention"}, "small": {"bench attention"}, "host": {"bench attention"},
        "kernels": {"bench startup"}, "startup": {"bench startup"},
        "verify": {"verify"}, "ladder": {"bench attention"}, "memory": {"bench memory"},
        "roofline": {"bench roofline"}, "engine_ladder": {"bench engine-ladder"}, "soak": {"bench soak"},
    }  # fmt: skip


def test_one_step_alone(tmp_path: Path) -> None:
    done, calls = run(tmp_path, "", "--only", "memory,soak", "--out", str(tmp_path / "out"))
    assert done.returncode == 0
    assert [parsed(call)[0] for call in calls] == ["bench memory", "bench soak"]


def test_a_failing_step_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    fails = 'case "$*" in *roofline*) exit 3 ;; esac'
    done, calls = run(tmp_path, fails, "--only", "memory,roofline,soak", "--out", str(tmp_path / "out"))
    assert done.returncode == 1
    assert "not whole: roofline (exit code 3)" in done.stderr
    assert [parsed(call)[0] for call in calls] == ["bench memory", "bench roofline", "bench soak"]


@pytest.mark.parametrize(("args", "told"), [(["--qick"], "unknown option"), (["--only"], "needs a value")])
def test_mistakes_are_told(tmp_path: Path, args: list[str], told: str) -> None:
    done, calls = run(tmp_path, "", *args)
    assert (done.returncode, calls) == (2, [])
    assert told in done.stderr


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """tests/gpu/run.py as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "gpu"))
    spec = importlib.util.spec_from_file_location("gpu_run", ROOT / "tests" / "gpu" / "run.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_run", module)
    spec.loader.exec_module(module)
    return module


def test_a_part_that_overruns_is_stopped_with_its_children(runner: ModuleType, tmp_path: Path) -> None:
    stays = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    start = time.monotonic()
    row = runner.run(runner.Part("slow", (sys.executable, "-c", stays)), 0.5, tmp_path)
    assert time.monotonic() - start < 30
    assert row["exit_status"] == "deadline"
    assert not runner.well(row)


def test_a_stopped_run_takes_its_parts_with_it(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    part = (
        f"import fcntl, time; file = open({str(lock)!r}, 'w'); fcntl.flock(file, fcntl.LOCK_EX); "
        "print('locked', file=file, flush=True); time.sleep(60)"
    )
    program = (
        "import pathlib, signal, sys, run; signal.signal(signal.SIGTERM, run.stop); "
        f"run.run(run.Part('slow', (sys.executable, '-c', {part!r})), 60, pathlib.Path({str(tmp_path)!r}))"
    )
    folders = os.pathsep.join(str(ROOT / folder) for folder in ("tests/gpu", "src"))
    runner = subprocess.Popen([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": folders})
    while not (lock.is_file() and lock.read_text()):
        assert runner.poll() is None
        time.sleep(0.05)
    runner.terminate()
    assert runner.wait(30) == 128 + signal.SIGTERM
    start = time.monotonic()
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # waits for the end of whoever holds it
    assert time.monotonic() - start < 30


@pytest.mark.parametrize(
    ("summary", "findings", "well"),
    [("ERROR SUMMARY: 0 errors", 0, True), ("RACECHECK SUMMARY: 3 hazards displayed (3 errors)", 3, False),
     ("nothing", None, False)],
)  # fmt: skip
def test_findings_of_the_sanitizer_are_counted(
    runner: ModuleType, tmp_path: Path, summary: str, findings: int | None, well: bool
) -> None:
    program = f"print('prefill/x: 7 cases'); print('========= {summary}')"
    row = runner.run(runner.Part("memcheck prefill/x 0/1", (sys.executable, "-c", program)), 60, tmp_path)
    assert (row["findings"], row["cases"], runner.well(row)) == (findings, 7, well)


def test_parts_cover_every_file_and_every_cuda_rung(runner: ModuleType, tmp_path: Path) -> None:
    names = {part.name for part in runner.test_parts(tmp_path)}
    files = {path.stem for path in (ROOT / "tests" / "gpu").glob("test_*.py")} | {"test_device"}
    counts = {file: runner.SPLIT.get(file, 1) for file in files}
    assert names == {f"{file} {i}/{count}" for file, count in counts.items() for i in range(count)}
    assert runner.SPLIT.keys() <= files
    watched = [part.name for part in runner.sanitizer_parts("compute-sanitizer", quick=False)]
    for rung in runner.sanitized.rungs():
        assert {f"{tool} {rung} {i}/4" for tool in ("memcheck", "racecheck") for i in range(4)} <= set(
            watched
        )
    cases = [case.name for i in range(4) for case in runner.sanitized.cases(i, 4, "all")]
    assert sorted(cases) == sorted(case.name for case in runner.sanitized.CORRECTNESS)
    assert {case.name for case in runner.sanitized.cases(0, 1, "few")} == runner.sanitized.FEW


def test_parts_of_a_file_run_each_of_its_tests_once(tmp_path: Path) -> None:
    file = tmp_path / "test_some.py"
    file.write_text("\n".join(f"def test_{i}(): pass" for i in range(7)), encoding="utf-8")
    given = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-c", ROOT / "pyproject.toml",
             "--confcutdir", ROOT, "-p", "tests.conftest", file]  # fmt: skip
    ran = []
    for index in range(3):
        done = subprocess.run([*given, "--part", f"{index}/3"], cwd=ROOT, capture_output=True, text=True)
        ran += [line.split("::")[1] for line in done.stdout.splitlines() if "::" in line]
    assert sorted(ran) == [f"test_{i}" for i in range(7)]


def test_counts_of_parts_add_up_over_runs(runner: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "x" / "gpu_tests.json"
    runner.keep(path, [{"part": "a", "passed": 1}, {"part": "b", "passed": 2}], "abc")
    runner.keep(path, [{"part": "b", "passed": 3}], "abc")
    assert Result.load(path).rows == [{"part": "a", "passed": 1}, {"part": "b", "passed": 3}]
    runner.keep(path, [{"part": "c", "passed": 4}], "def")  # other sources: nothing of theirs is kept
    assert Result.load(path).rows == [{"part": "c", "passed": 4}]


def test_pytest_leaves_its_counts(tmp_path: Path) -> None:
    report = tmp_path / "counts.json"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/test_device.py", "--gpu-report"]
    subprocess.run([*command, str(report)], cwd=ROOT, capture_output=True, timeout=120)
    counts = json.loads(report.read_text())
    assert counts["exit_status"] in (0, 5)
    assert counts["failed"] == counts["error"] == 0
