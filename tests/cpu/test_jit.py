"""Where compiled kernels are kept, when numba is loaded, and what kernels are made of."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("numba")

import numba
import numpy as np
import torch

from strobe.cpu import atomic, jit, kernel, threads
from strobe.cpu.jit import FASTMATH
from strobe.cpu.kernel import HIGHEST, LOWEST

PROGRAM = """
from strobe.cpu.jit import compiled

@compiled("float32(float32)")
def double(x):
    return x + x

print(double(21.0), sum(double.stats.cache_hits.values()))
"""


def run_program(folder: Path, *python: str) -> subprocess.Popen[str]:
    """PROGRAM as a file that a cache may name, or what `python` says."""
    environ = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    (folder / "program.py").write_text(PROGRAM)
    return subprocess.Popen(
        [sys.executable, *(python or ("program.py",))],
        cwd=folder,
        env={**environ, "STROBE_CACHE_DIR": str(folder / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_processes_compile_at_once_and_a_third_reads_what_they_kept(tmp_path):
    for process in [run_program(tmp_path), run_program(tmp_path)]:
        out, err = process.communicate(timeout=120)
        assert (out.split()[0], err) == ("42.0", "")
    out, err = run_program(tmp_path).communicate(timeout=120)
    assert (out.split(), err) == (["42.0", "1"], "")
    assert list((tmp_path / "cache" / "numba").rglob("*.nbi")), "kept in strobe's own folder"
    assert not list(tmp_path.glob("__pycache__/*.nbi"))


def test_a_folder_that_cannot_be_written_is_done_without(tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    out, err = run_program(tmp_path).communicate(timeout=120)
    assert (out.split(), err) == (["42.0", "0"], "")


def test_a_kernel_that_nothing_can_keep_is_compiled_each_time(tmp_path):
    out, err = run_program(tmp_path, "-c", PROGRAM).communicate(timeout=120)
    assert out.split() == ["42.0", "0"]
    assert "kept in memory only" in err
    assert "STROBE_CACHE_DIR" in err


def test_numba_is_loaded_with_the_first_kernel_and_not_before():
    program = (
        "import sys, torch, strobe.engine\n"
        "from strobe.linear import Projection, empty_weight, ladder\n"
        "from strobe.linear.problem import LinearProblem\n"
        "ladder.choose(LinearProblem(1, 8, 8, 'float32'))\n"
        "print('numba' in sys.modules)\n"
        "weight = empty_weight(8, 8, device='cpu', dtype=torch.float32).fill_(1.0)\n"
        "Projection(weight)(torch.ones(1, 8))\n"
        "print('numba' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["False", "True"], done.stderr


@pytest.mark.parametrize("fastmath", [False, FASTMATH])
def test_exp_is_right_to_two_units_in_the_last_place(fastmath):
    options = {name: value for name, value in kernel.exp.targetoptions.items() if name != "nopython"}
    exp = numba.njit(kernel.exp.py_func, **options)  # compiled for this caller

    @numba.njit(fastmath=fastmath)
    def every(x, out):
        for i in range(x.size):
            out[i] = exp(x[i])

    x = np.sort(np.random.default_rng().uniform(LOWEST, HIGHEST, 200_000).astype(np.float32))
    out = np.empty_like(x)
    every(x, out)
    np.testing.assert_array_max_ulp(out, np.exp(x.astype(np.float64)).astype(np.float32), maxulp=2)
    edges = np.array([-np.inf, -1e30, 0.0, 1e30, np.inf, np.nan], np.float32)
    out = np.empty_like(edges)
    every(edges, out)
    assert out[0] == out[1] <= 1.2e-38
    assert out[2] == 1.0
    assert 1e38 < out[3] == out[4] < math.inf
    assert np.isnan(out[5])


@jit.kernel
def _note(at):
    """Writes into each part's place which part it is, and says how many there were to do."""
    _, _, parts, out_at = kernel.longs(at, (4,))
    out = kernel.longs(out_at, (parts,))
    while True:
        part = kernel.take(at)
        if part >= parts:
            break
        out[part] += part + 1
    kernel.longs(at, (2,))[threads.STATUS] = parts


@pytest.mark.parametrize("count", [1, 2, 3])
def test_threads_take_each_part_once_and_their_status_is_told(count):
    for parts in (0, 1, 2, 1000, 0, 100_000):
        out = np.zeros(parts, np.int64)
        assert threads.run(_note, (parts, out.ctypes.data), count) == parts
        assert out.tolist() == list(range(1, parts + 1))


def test_many_users_threads_may_run_kernels_at_once():
    from concurrent.futures import ThreadPoolExecutor

    outs = [np.zeros(50, np.int64) for _ in range(100)]
    with ThreadPoolExecutor(5) as pool:
        list(pool.map(lambda out: threads.run(_note, (50, out.ctypes.data), 2), outs))
    assert all(out.tolist() == list(range(1, 51)) for out in outs)


@jit.kernel
def _meet(at):
    """A part for each of two threads, which neither ends before the other has come."""
    _, _, came_at = kernel.longs(at, (3,))
    part = kernel.take(at)
    if part < 2:
        atomic.add(came_at, 1)
        while atomic.load(came_at) < 2:
            atomic.nap()


def test_helpers_come_at_first_and_again_when_they_have_slept():
    for _ in range(2):
        for _ in range(3):
            came = np.zeros(1, np.int64)
            threads.run(_meet, (came.ctypes.data,), 2)
            assert came.tolist() == [2]
        deadline = time.monotonic() + 30
        while len(threads._team()._asleep) < len(threads._team()._helpers):
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_process_and_its_fork_use_helpers_and_end():
    program = (
        "import os, sys, torch\n"
        "from strobe.linear import Projection, empty_weight, numba_tiled\n"
        "numba_tiled._THREAD_WORK = 1\n"
        "torch.set_num_threads(2)\n"
        "one = Projection(empty_weight(512, 8, device='cpu', dtype=torch.float32).fill_(1.0))\n"
        "print(one(torch.ones(1, 8), kernel='numba_tiled').sum().item(), flush=True)\n"
        "child = os.fork()\n"
        "torch.set_num_threads(2)\n"
        "print(one(torch.ones(1, 8), kernel='numba_tiled').sum().item(), flush=True)\n"
        "child and sys.exit(os.waitpid(child, 0)[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.stdout.split(), done.returncode) == (["4096.0"] * 3, 0), done.stderr


def test_work_is_worth_as_many_threads_as_it_feeds():
    was = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert [threads.worth(work, 10) for work in (0, 9, 10, 19, 20, 30, 1000)] == [1, 1, 1, 1, 2, 3, 3]
    finally:
        torch.set_num_threads(was)


def test_the_version_of_the_cache_follows_what_kernels_share(tmp_path, monkeypatch):
    monkeypatch.setattr(jit, "__file__", str(tmp_path / "jit.py"))
    versions = []
    for text in ("a", "b", "a"):
        (tmp_path / "kernel.py").write_text(text)
        versions.append(jit._version.__wrapped__())
    assert versions[0] == versions[2] != versions[1]


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT as a shell leaves it: a runner may ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_waits_for_a_compilation() -> None:
    done = []

    def compiler(signature: str, **options: object) -> Callable:
        def compile(function: Callable) -> Callable:
            signal.raise_signal(signal.SIGINT)
            done.append(signature)
            return function

        return compile

    with pytest.raises(KeyboardInterrupt):
        jit._compile(compiler, "void()", print)
    assert done == ["void()"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_waits_for_an_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slow_kernel.py").write_text(
        "import signal\nsignal.raise_signal(signal.SIGINT)\nwhole = True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        jit.kernels("slow_kernel")
    assert sys.modules.pop("slow_kernel").whole


def test_another_thread_compiles_as_ever(interruptible: None) -> None:
    found = []
    thread = threading.Thread(target=lambda: found.append(jit.kernels("strobe.cpu.kernel")))
    thread.start()
    thread.join()
    assert found == [kernel]


def test_a_cache_that_holds_none_of_this_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STROBE_CACHE_DIR", str(tmp_path))
    assert jit.to_compile()
    for version in ("of another", jit._version()):
        kept = tmp_path / "numba" / version / "linear_1" / "kernel.nbc"
        kept.parent.mkdir(parents=True)
        kept.touch()
        assert jit.to_compile() == (version == "of another")
