"""What every test shares: one thread a worker, fresh random examples, a reason for each skip."""

from __future__ import annotations

import json
import os
from collections import Counter
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
    parser.addoption("--gpu-report", type=Path, help="leave the counts of this run in FILE, as JSON")
    parser.addoption("--part", default="0/1", help="run every Nth test from the Ith on, given as I/N")
    parser.addoption("--emulate-all", action="store_true", help="emulate the rungs' whole case table")


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config
) -> None:
    _show_kernels(terminalreporter)
    report = config.getoption("--gpu-report")
    if report is None:
        return
    counts = Counter({kind: len(terminalreporter.getreports(kind)) for kind in ("passed", "failed", "error")})
    skipped = Counter(report.longrepr[2] for report in terminalreporter.getreports("skipped"))
    row = {**counts, "skipped": dict(skipped), "exit_status": int(exitstatus)}
    report.write_text(json.dumps(row), encoding="utf-8")


def _show_kernels(terminalreporter: pytest.TerminalReporter) -> None:
    """What each compiled kernel takes, as tests/cuda/test_compile.py recorded it."""
    reports = [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]
    lines = [line for report in reports for name, line in report.user_properties if name == "kernel"]
    if lines:
        terminalreporter.section("CUDA kernels")
        for line in sorted(set(lines)):
            terminalreporter.write_line(line)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    index, parts = map(int, config.getoption("--part").split("/"))
    items[:] = items[index::parts]
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU; torch sees none"))
