from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from strobe.cuda import jit

from .conftest import Cli


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> jit.Source:
    pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")
    monkeypatch.setenv("STROBE_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "twice.cu"
    path.write_text('extern "C" __global__ void twice(float* x) { x[threadIdx.x] *= FACTOR; }\n')
    return jit.Source(path, {"FACTOR": 2})


def test_list_then_clear(cli: Cli, source: jit.Source) -> None:
    assert json.loads(cli("cache", "list", "--json").out) == []
    jit.compile(source.path, source.defines, "sm_90a")
    (entry,) = json.loads(cli("cache", "list", "--json").out)
    assert entry["name"].startswith("twice")
    assert entry["arch"] == "sm_90a"
    assert entry["defines"] == {"FACTOR": "2"}
    assert "FACTOR=2" in cli("cache", "list").out
    assert "1 compiled kernel" in cli("cache", "clear").err
    assert json.loads(cli("cache", "list", "--json").out) == []


def test_the_cpus_kernels_are_listed_and_cleared_too(cli: Cli, tmp_path: Path) -> None:
    pytest.importorskip("numba")
    (tmp_path / "program.py").write_text(
        "from strobe.cpu.jit import compiled, kernel\n"
        "@compiled('float32(float32)')\n"
        "def twice(x):\n"
        "    return x + x\n"
        "def outer():\n"
        "    @kernel\n"
        "    def nothing(at):\n"
        "        pass\n"
        "outer()\n"
    )
    environ = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    environ["STROBE_CACHE_DIR"] = str(tmp_path / "cache")
    subprocess.run([sys.executable, "program.py"], cwd=tmp_path, env=environ, check=True, timeout=120)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("STROBE_CACHE_DIR", str(tmp_path / "cache"))
        listed = json.loads(cli("cache", "list", "--json").out)
        assert [(e["name"], e["arch"]) for e in listed] == [
            ("program.nothing", "cpu"),
            ("program.twice", "cpu"),
        ]
        assert all(e["bytes"] > 100 for e in listed)
        assert "program.twice" in cli("cache", "list").out
        assert "2 compiled kernels" in cli("cache", "clear").err
        assert not list((tmp_path / "cache" / "numba").iterdir())
        assert json.loads(cli("cache", "list", "--json").out) == []


def test_warm_needs_an_arch_that_exists(cli: Cli, source: jit.Source) -> None:
    for arch in ("sm_1", "sm_90aa", "sm_90x"):
        error = cli("cache", "warm", "--arch", arch).error
        assert f"unknown arch '{arch}'; known: sm_80" in error
        assert "sm_90, sm_90a, sm_100" in error


def test_warm_needs_an_arch_that_has_bfloat16(cli: Cli, source: jit.Source) -> None:
    assert "unknown arch 'sm_75'; known: sm_80" in cli("cache", "warm", "--arch", "sm_75").error


def test_warm_without_a_gpu_asks_for_an_arch(
    cli: Cli, source: jit.Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("strobe.device.has_gpu", lambda: False)
    assert "--arch" in cli("cache", "warm").error


def test_warm_says_at_once_that_nothing_can_be_kept(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("STROBE_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert str(tmp_path / "file") in cli("cache", "warm", "--arch", "sm_90a").error


def test_compilation_is_logged_when_asked(source: jit.Source, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "strobe")
    for _ in range(2):
        jit.compile(source.path, source.defines, "sm_80")
    (record,) = caplog.records
    assert "compiled twice" in record.getMessage()
    assert "sm_80" in record.getMessage()
