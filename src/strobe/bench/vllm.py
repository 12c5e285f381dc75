"""vLLM beside strobe: the same shapes, prompts and lengths, in a process of its own with the GPU to itself.

It draws weights of its own (`load_format="dummy"`), for which a folder with a config.json is enough: its
tokens are not strobe's and are not compared; its time does not depend on them. VLLM_PYTHONPATH, where it
is set, is put before the child's PYTHONPATH. What goes wrong in there is a result that says so.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import strobe
from strobe.bench.engine_cases import Job
from strobe.bench.foreign import write_config
from strobe.errors import StrobeError
from strobe.models.config import ModelConfig

MODES = {"vllm": "1", "vllm-in-process": "0"}
"""By the peer's name: VLLM_ENABLE_V1_MULTIPROCESSING. vLLM's default is an engine in a process apart."""
OPTIONS: dict[str, Any] = {
    "load_format": "dummy",
    "skip_tokenizer_init": True,
    "gpu_memory_utilization": 0.85,
    "enable_prefix_caching": False,
}
_WORKER = "strobe.bench.vllm_worker"
_SOURCES = str(Path(strobe.__file__).parents[1])


def check_installed() -> None:
    """Raise StrobeError where there is no vLLM to start."""
    folders = os.environ.get("VLLM_PYTHONPATH", "").split(os.pathsep)
    apart = any(folder and Path(folder, "vllm").is_dir() for folder in folders)
    if not apart and importlib.util.find_spec("vllm") is None:
        raise StrobeError("vllm is not installed", hint="pip install vllm, or set VLLM_PYTHONPATH")


def measure(
    config: ModelConfig,
    dtype: str,
    jobs: Sequence[Job],
    *,
    peer: str = "vllm",
    max_model_len: int,
    timeout_s: float = 900.0,
) -> tuple[list[list[float] | str], dict[str, Any]]:
    """Each job's seconds a run, or why there are none; and what the process told of itself.

    `peer` is one of MODES. The child is killed, with all that it started, after `timeout_s`.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_config(config, folder / "model", dtype)
        options = {**OPTIONS, "dtype": dtype, "max_model_len": max_model_len}
        spec = {"folder": str(folder / "model"), "options": options, "jobs": [asdict(job) for job in jobs]}
        (folder / "jobs.json").write_text(json.dumps(spec), encoding="utf-8")
        ending = _run(folder, MODES[peer], timeout_s)
        path = folder / "results.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    about: dict[str, Any] = {}
    found: list[list[float] | str] = []
    for line in map(json.loads, lines):
        if "start_s" in line:
            about = line
        else:
            found.append(line.get("s") or line["failed"])
    return found + [ending or "no result"] * (len(jobs) - len(found)), about


def _run(folder: Path, multiprocessing: str, timeout_s: float) -> str | None:
    """Run the child to its end. Says how it ended where that was not well."""
    paths = [os.environ.get("VLLM_PYTHONPATH"), os.environ.get("PYTHONPATH"), _SOURCES]
    environ = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "VLLM_ENABLE_V1_MULTIPROCESSING": multiprocessing,
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    # as a module: a script's own folder would come before vLLM's modules
    command = [sys.executable, "-m", _WORKER, str(folder / "jobs.json"), str(folder / "results.jsonl")]
    with (folder / "log").open("w+", encoding="utf-8", errors="replace") as log:
        child = subprocess.Popen(command, env=environ, stdout=log, stderr=log, start_new_session=True)
        try:
            code = child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return f"stopped after {timeout_s:.0f} s"
        finally:
            _end(child)
        if code == 0:
            return None
        log.seek(0)
        said = [line.strip() for line in log if "Error" in line]
        return f"exit code {code}: {said[-1][:300] if said else 'no error message'}"


def _end(child: subprocess.Popen[bytes]) -> None:
    """Nothing that the child started outlives it and holds the GPU's memory."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
