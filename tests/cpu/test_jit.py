"""Where compiled kernels are kept, when numba is loaded, and what kernels are made of."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba")

import numba
import numpy as np

from strobe.cpu import jit, kernel, threads
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
        "ladder.explain(LinearProblem(1, 8, 8, 'float32'))\n"
        "print('numba' in sys.modules)\n"
        "weight = empty_weight(8, 8, device='cpu', dtype=torch.float32).fill_(1.0)\n"
        "Projection(weight)(torch.ones(1, 8))\n"
        "print('numba' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["False", "True"], done.stderr


@pytest.mark.parametrize("fastmath", [False, FASTMATH])
def test_exp_is_right_to_two_units_in_the_last_place(fastmath):
    exp = numba.njit(kernel.exp.py_func, **kernel.exp.targetoptions)  # compiled for this caller

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


@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_parts_cover_the_range_once(count):
    ranges = threads.parts(count, 5)
    assert [begin for begin, _ in ranges] == [0, *(end for _, end in ranges[:-1])]
    assert ranges[-1][1] == count


def test_an_error_in_a_thread_is_raised_when_all_are_done():
    done = []

    def call(begin: int, end: int) -> None:
        if begin == 1:
            raise ValueError("in part 1")
        done.append(begin)

    with pytest.raises(ValueError, match="part 1"):
        threads.run(call, [(0, 1), (1, 2), (2, 3)])
    assert sorted(done) == [0, 2]


def test_the_version_of_the_cache_follows_what_kernels_share():
    assert len(jit._version()) == 16
