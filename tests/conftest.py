"""What every test shares: one thread a worker, fresh random examples, a reason for each skip."""

from __future__ import annotations

import json
import os
import subprocess
from collections import Counter
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported, also by subprocesses

import pytest

try:
    import hypothesis
except ImportError:  # GPU machines run their marked tests without it
    pass
else:
    hypothesis.settings.register_profile("strobe", deadline=None, print_blob=True)
    hypothesis.settings.load_profile("strobe")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--gpu-report", type=Path, help="on a GPU, leave the counts in FOLDER/<gpu>/gpu_tests.json"
    )


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config
) -> None:
    folder = config.getoption("--gpu-report")
    if folder is None:
        return
    from strobe import device

    machine = device.machine()
    if not machine.gpus:
        return
    counts = Counter({kind: len(terminalreporter.getreports(kind)) for kind in ("passed", "failed", "error")})
    skipped = Counter(report.longrepr[2] for report in terminalreporter.getreports("skipped"))
    report = {
        "bench": "gpu_tests",
        "commit": _commit(),
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": asdict(machine),
        "rows": [{**counts, "skipped": dict(skipped), "exit_status": int(exitstatus)}],
    }
    path = folder / machine.gpus[0].slug / "gpu_tests.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    terminalreporter.write_line(f"counts are in {path}")


def _commit() -> str | None:
    """The commit under test; None where the tree is no git checkout."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if "gpu" in item.keywords]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU; torch sees none"))
