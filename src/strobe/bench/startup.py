"""How long until the first token, in a new process each time: with the compiled kernels at hand and without.

Also how long each kernel takes to compile, and in a new process to load. A child process of this
module does the work and tells its times in JSON.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import strobe
from strobe.bench.results import Row
from strobe.errors import StrobeError

PHASES = ("import_s", "network_s", "engine_s", "first_token_s")
_MODULE = "strobe.bench.startup"
_PROMPT = 128


@dataclass(frozen=True)
class Start:
    """What is started: a checkpoint (None: the bundled model), or random weights of `shape`."""

    model: str | None = None
    shape: str | None = None
    device: str = "cpu"
    dtype: str = "auto"
    config: dict[str, Any] = field(default_factory=dict)
    """Fields of EngineConfig."""


def measure(start: Start, runs: int = 3) -> list[Row]:
    """A row with an empty kernel cache and one with a full one, each the median of `runs` new processes.

    Seconds from the moment that the process is asked for: until strobe and torch are imported, the network
    is there, the engine with its cache is, and the first token of a prompt of 128 is.

    Raises:
        StrobeError: the child failed; the message holds its last line.
    """
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for cache in ("cold", "warm"):
            told = []
            for index in range(runs):
                home = Path(folder) / (f"cold{index}" if cache == "cold" else "cold0")
                told.append(_child(home, "start", asdict(start)))
            rows.append(_row(cache, told))
    return rows


def _row(cache: str, told: Sequence[dict[str, Any]]) -> Row:
    row: Row = {"case": {**told[0]["case"], "cache": cache}, "provider": "strobe", "checked": None}
    totals = sorted(each["total_s"] for each in told)
    for phase in PHASES:
        row[phase] = statistics.median(each[phase] for each in told)
    row |= {"total_s": statistics.median(totals), "total_s_min": totals[0], "total_s_max": totals[-1]}
    return row | {"runs": len(told)}


def measure_kernels(arch: str) -> list[Row]:
    """A row for each source: the longest of its variants to compile, and to load in a new process.

    Loading is from the disk's cache and, where there is a GPU, onto it.

    Raises:
        As `measure`.
    """
    with tempfile.TemporaryDirectory() as folder:
        compiled, loaded = (_child(Path(folder), "kernels", {"arch": arch}) for _ in range(2))
    rows: list[Row] = []
    for name, seconds in compiled["sources"].items():
        again = loaded["sources"][name]
        rows.append(
            {
                "case": {"source": name, "arch": arch, "variants": len(seconds)},
                "provider": "strobe",
                "checked": None,
                "compile_s": max(seconds),
                "load_ms": 1e3 * max(again),
                "load_ms_median": 1e3 * statistics.median(again),
                "on_gpu": loaded["on_gpu"],
            }
        )
    return rows


def measure_rungs(device: str, arch: str) -> list[Row]:
    """A row for each rung that compiles something for a "cuda" or "cpu" device (first_use.py): seconds that
    its first call takes with nothing compiled, milliseconds in a new process with all of it kept.

    Raises:
        As `measure`.
    """
    rows = []
    for line in _output(["strobe.bench.first_use", device], {}).splitlines():
        told = json.loads(line)
        case = {"rung": told.pop("rung"), "arch": arch}
        rows.append({"case": case, "provider": "strobe", "checked": None, **told})
    return rows


def _child(cache: Path, what: str, given: dict[str, Any]) -> dict[str, Any]:
    """A new process of this module, with kernel caches of its own under `cache`."""
    caches = {"STROBE_CACHE_DIR": str(cache), "TRITON_CACHE_DIR": str(cache / "triton")}
    told = _output([_MODULE, what, json.dumps(given), repr(time.time())], caches)
    return json.loads(told.splitlines()[-1])


def _output(arguments: list[str], settings: dict[str, str]) -> str:
    """What a new process of a module writes."""
    found = [str(Path(strobe.__file__).parents[1]), os.environ.get("PYTHONPATH")]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, found)), **settings}
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no error message"])[-1]
        raise StrobeError(f"the process that was to start failed: {last}")
    return done.stdout


def _start(given: dict[str, Any], asked: float) -> dict[str, Any]:
    """In the child: to the first token, with the time of each phase. `asked` is when the parent asked."""
    from strobe.bench.engine_cases import Batch
    from strobe.bench.subject import Subject, find_network
    from strobe.engine import Engine, EngineConfig, Request, SamplingParams

    marks = [asked, time.time()]
    network, tokenizer, name, folder = find_network(
        given["model"], given["shape"], device=given["device"], dtype=given["dtype"]
    )
    marks.append(_now())
    subject = Subject(name, Engine(network, tokenizer, EngineConfig(**given["config"])), folder)
    marks.append(_now())
    prompt_len = min(_PROMPT, subject.engine.max_model_len - 2)
    prompt = Batch(1, prompt_len, 2).jobs(network.config.vocab_size, 1)[0].prompts[0]
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    subject.engine.add(Request("0", prompt, params))
    while subject.engine.has_work:
        subject.engine.step()
    marks.append(_now())
    told: dict[str, Any] = {
        phase: after - before for phase, before, after in zip(PHASES, marks, marks[1:], strict=False)
    }
    return told | {"total_s": marks[-1] - asked, "case": subject.case(prompt=prompt_len)}


def _now() -> float:
    """When the device has done what it was asked for."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.time()


def _kernels(given: dict[str, Any]) -> dict[str, Any]:
    """In the child: seconds until each source's variants are there, on the GPU where there is one."""
    from strobe import device
    from strobe.cuda import jit, sources
    from strobe.cuda.driver import load_module

    arch = given["arch"]
    on_gpu = device.has_gpu() and jit.arch_of() == arch
    if on_gpu:
        _now()  # what the first call sets up is no kernel's
    taken: dict[str, list[float]] = {}
    for source in sources.every(arch):
        start = time.perf_counter()
        cubin = jit.compile(source.path, source.defines, arch)
        if on_gpu:
            load_module(cubin, 0)
        taken.setdefault(sources.name_of(source), []).append(time.perf_counter() - start)
    return {"sources": taken, "on_gpu": on_gpu}


if __name__ == "__main__":
    what, given, asked = sys.argv[1:]
    answer = _start(json.loads(given), float(asked)) if what == "start" else _kernels(json.loads(given))
    sys.stdout.write(json.dumps(answer) + "\n")
