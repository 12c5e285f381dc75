"""The GPU's tests and compute-sanitizer's runs, several processes at a time, each with a deadline.

    python tests/gpu/run.py tests                 # every file of tests/gpu, and tests/test_device.py
    python tests/gpu/run.py sanitize --quick      # memcheck and racecheck over few cases
    python tests/gpu/run.py tests --only cuda_hopper --deadline 120

Several processes share one GPU well: tests wait for the host most of the time. What each part counted goes to
FOLDER/<gpu>/gpu_tests.json, where a part that ran before is kept until it runs again with other sources.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sanitized

from strobe import device
from strobe.bench.results import Result

ROOT = Path(__file__).parents[2]
TOOLS = ("memcheck", "racecheck")
SPLIT = {"test_prefill_rungs": 8, "test_cuda_hopper": 4, "test_decode_rungs": 3}
"""Files that take longer than the others, and among how many processes each is dealt."""
OPS = {"test_cache_ops": 1, "test_linear_rungs": 6, "test_projected_append": 3, "test_sampling": 1}
"""Tests of what is no rung of attention, which the sanitizer watches: among how many processes."""
RACED = {"test_linear_rungs": 6, "test_projected_append": 6, "test_sampling": 6}
"""Of those, racecheck sees every so manyth test: it takes minutes for one product of a model's size."""
_SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:errors?|hazards?)")


_running: set[int] = set()
"""Process groups of the parts that run."""


def stop(signum: int, frame: object) -> None:
    """End with all that was started: parts are sessions of their own, which no signal to this one reaches."""
    for group in list(_running):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
    os._exit(128 + signum)


@dataclass(frozen=True)
class Part:
    """One process: `name` is what its row is known by, `argv` how it is started."""

    name: str
    argv: tuple[str, ...]
    environ: dict[str, str] = field(default_factory=dict)


def test_parts(folder: Path) -> list[Part]:
    files = [*sorted((ROOT / "tests" / "gpu").glob("test_*.py")), ROOT / "tests" / "test_device.py"]
    dealt = [
        (file, index, SPLIT.get(file.stem, 1)) for file in files for index in range(SPLIT.get(file.stem, 1))
    ]
    dealt.sort(key=lambda each: -each[2])
    return [
        Part(
            name := f"{file.stem} {index}/{parts}",
            (
                sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", str(file),
                "--part", f"{index}/{parts}", "--gpu-report", str(report(folder, name)),
            ),
        )
        for file, index, parts in dealt
    ]  # fmt: skip


def report(folder: Path, part: str) -> Path:
    """Where a part of the tests leaves its counts."""
    return folder / f"{part.replace('/', '.').replace(' ', '-')}.json"


def sanitizer_parts(sanitizer: str, quick: bool) -> list[Part]:
    which, split = ("few", 1) if quick else ("all", 4)
    # without torch's caching, each tensor's end is an allocation's end, where memcheck sees it
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    programs: list[tuple[str, tuple[str, ...], dict[str, str]]] = [
        (
            f"{rung} {index}/{split}",
            (str(Path(sanitized.__file__)), rung, f"{index}/{split}", which),
            uncached,
        )
        for rung in sanitized.rungs()
        for index in range(split)
    ]
    tools = [(tool, f"{tool} {name}", argv, environ) for tool in TOOLS for name, argv, environ in programs]
    for tool, (name, parts) in () if quick else itertools.product(TOOLS, OPS.items()):
        file = str(ROOT / "tests" / "gpu" / f"{name}.py")
        for index in range(parts):
            every = RACED.get(name, 1) if tool == "racecheck" else 1
            part = f"{index}/{parts * every}"
            argv = ("-m", "pytest", "-q", "-m", "gpu", file, "--part", part)
            # these capture graphs, in which nothing may be allocated but from torch's cache
            tools.append((tool, f"{tool} {name} {part}", argv, {}))
    return [
        Part(
            name,
            (sanitizer, "--tool", tool, "--report-api-errors", "no", "--error-exitcode", "9", sys.executable,
             *argv),
            environ,
        )
        for tool, name, argv, environ in tools
    ]  # fmt: skip


def run(part: Part, deadline_s: float, logs: Path) -> dict[str, Any]:
    """Run a part to its end or its deadline; nothing that it started outlives it."""
    log, start = report(logs, part.name).with_suffix(".log"), time.monotonic()
    sources = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    environ = {**os.environ, "PYTHONPATH": sources, **part.environ}
    with log.open("w+", encoding="utf-8", errors="replace") as out:
        child = subprocess.Popen(
            part.argv, cwd=ROOT, env=environ, stdout=out, stderr=out, start_new_session=True
        )
        _running.add(child.pid)
        try:
            status: int | str = child.wait(deadline_s)
        except subprocess.TimeoutExpired:
            status = "deadline"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            _running.discard(child.pid)
    told = log.read_text(encoding="utf-8", errors="replace")
    row = {"part": part.name, "exit_status": status, "s": round(time.monotonic() - start, 1)}
    found = _SUMMARY.findall(told)
    if part.name.startswith(TOOLS):
        row["findings"] = sum(map(int, found)) if found else None
        ran = re.findall(r": (\d+) cases", told)
        row |= {"cases": int(ran[-1])} if ran else {}
    return row


def well(row: dict[str, Any]) -> bool:
    """Whether a part ran to its end and found nothing wrong. pytest's 5 is "no tests"."""
    return row["exit_status"] in (0, 5) and row.get("findings", 0) == 0


def keep(path: Path, rows: list[dict[str, Any]], commit: str | None) -> None:
    """Write the rows, with those of other parts that the same sources gave before."""
    result = Result.here("gpu_tests", rows, commit=commit)
    if path.is_file():
        before = Result.load(path)
        mine = {row["part"] for row in rows}
        if (before.commit, before.machine.get("gpu")) == (result.commit, result.machine.get("gpu")):
            result.rows[:0] = [row for row in before.rows if row.get("part") not in mine]
    result.save(path)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["tests", "sanitize"])
    parser.add_argument("--only", default="", help="parts whose name holds one of these, by comma")
    parser.add_argument("--quick", action="store_true", help="with sanitize: few cases")
    parser.add_argument("--jobs", type=int, default=min(12, os.cpu_count() or 1), help="processes at a time")
    parser.add_argument("--deadline", type=float, default=240.0, help="seconds for each part")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="FOLDER")
    parser.add_argument("--commit", help="the sources' commit, where they have no git folder")
    given = parser.parse_args()
    gpus = device.machine().gpus
    if not gpus:
        sys.stderr.write("error: needs an NVIDIA GPU; torch sees none\n")
        return 2
    sanitizer = shutil.which("compute-sanitizer")
    if given.what == "sanitize" and sanitizer is None:
        sys.stderr.write("error: compute-sanitizer is not on PATH (it comes with the CUDA toolkit)\n")
        return 2
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, stop)
    logs = Path(tempfile.mkdtemp(prefix="strobe-gpu-"))
    parts = test_parts(logs) if given.what == "tests" else sanitizer_parts(str(sanitizer), given.quick)
    parts = [part for part in parts if any(each in part.name for each in given.only.split(","))]
    rows: list[dict[str, Any]] = []
    with ThreadPoolExecutor(given.jobs) as pool:
        for row in pool.map(lambda part: run(part, given.deadline, logs), parts):
            counts = report(logs, row["part"])
            if counts.is_file():
                row |= json.loads(counts.read_text(encoding="utf-8"))
            rows.append(row)
            print(("ok    " if well(row) else "FAILED"), json.dumps(row), flush=True)
            keep(given.out / gpus[0].slug / "gpu_tests.json", rows, given.commit)
    failed = [row["part"] for row in rows if not well(row)]
    print(f"{len(rows) - len(failed)} of {len(rows)} parts are well; logs in {logs}")
    for name in failed:
        print(f"FAILED {name}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
