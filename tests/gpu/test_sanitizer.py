"""compute-sanitizer finds nothing in any CUDA kernel: no access out of bounds, no race in shared memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_sanitizer_is_clean(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not on PATH (it comes with the CUDA toolkit)")
    # without torch's caching, each tensor's end is an allocation's end, where memcheck sees it
    environ = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    program = [sys.executable, str(Path(__file__).with_name("sanitized.py"))]
    watched = [sanitizer, "--tool", tool, "--report-api-errors", "no", "--error-exitcode", "9", *program]
    done = subprocess.run(watched, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "0 errors" in done.stdout or "0 hazards" in done.stdout, done.stdout[-2000:]
