"""Bodies that nobody would send, in their hundreds; `load.py` sends them in their thousands."""

from __future__ import annotations

import asyncio
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from . import load
from .conftest import LiveServer

CHECKS = """
    not_a_server_error status_code_conformance content_type_conformance response_headers_conformance
    response_schema_conformance negative_data_rejection unsupported_method
""".split()


def test_hostile_bodies_are_refused_or_served(idle: LiveServer) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    ended = asyncio.run(load.fuzz(load.Server(idle.url), 600, random.Random(seed)))
    assert set(ended) <= {"200", "400", "404"}
    assert ended["200"] > 10
    idle.settle()
    assert idle.post("/v1/completions", {"prompt": "O", "max_tokens": 2}).status_code == 200


def test_the_server_keeps_to_its_openapi_document(idle: LiveServer, tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("schemathesis")
    if not program.exists() and shutil.which("schemathesis") is None:
        pytest.skip("needs schemathesis")
    command = [
        str(program), "run", f"{idle.url}/openapi.json", "--max-examples", "6", "--no-color",
        "--continue-on-failure", "--phases", "examples,coverage,fuzzing", "--checks", ",".join(CHECKS),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-6000:]
