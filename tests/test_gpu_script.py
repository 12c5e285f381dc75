"""benchmarks/gpu.sh: every command of it is one that `strobe` understands, and each writes its own file."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

from typer.main import get_command

from strobe.cli.main import app

ROOT = Path(__file__).parents[1]


def test_every_command_is_understood(tmp_path: Path) -> None:
    fake, log = tmp_path / "python3", tmp_path / "log"
    fake.write_text(f'#!/bin/sh\nfor word; do printf "%s\\n" "$word"; done >> {shlex.quote(str(log))}\n')
    fake.chmod(0o755)
    environ = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = ["sh", str(ROOT / "benchmarks/gpu.sh"), "fa2,fa3", "fa3", str(tmp_path / "out"), "abc"]
    subprocess.run(script, env=environ, check=True, timeout=30)
    commands = log.read_text().split("-m\nstrobe\n")[1:]
    saved = []
    for words in commands:
        command, args = get_command(app), words.splitlines()
        while hasattr(command, "commands"):
            command = command.commands[args.pop(0)]
        parsed = command.make_context("strobe", args).params
        assert parsed["commit"] == "abc"
        saved.append(parsed["save"].name)
    assert saved == [
        f"{bench}.json" for bench in ("prefill", "decode", "ladder", "memory", "roofline", "engine_ladder")
    ]
