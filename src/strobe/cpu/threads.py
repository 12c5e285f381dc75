"""Kernels on several cores, by the threads that torch runs its own loops on.

A team is handed a kernel in 2 us where a pool of Python's threads takes 25 (two cores): between two loops of
OpenMP its threads wait awake. A second pool would wait for torch's on the same cores.
"""

from __future__ import annotations

import ctypes
import os
from array import array
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

from strobe.cpu.jit import Kernel

STATUS = 1
"""Which of its int64s a kernel may say something in; 0 at first. The one before it counts the parts that are
taken (`kernel.take`), and behind it are the numbers that the kernel is given."""


def run(kernel: Kernel, numbers: Iterable[int], threads: int) -> int:
    """Call a kernel in so many threads at once, which share its parts. Returns its status.

    As C code does, it reads and writes at the addresses among its numbers.
    """
    block = array("q", (0, 0, *numbers))
    address = block.buffer_info()[0]
    team = _team()
    if threads == 1:
        kernel.call(address)
    elif team is not None:
        team(kernel.address, address, threads, 0)
    else:
        for done in [_pool().submit(kernel.call, address) for _ in range(threads)]:
            done.result()
    return block[STATUS]


def worth(work: int, least: int) -> int:
    """How many threads to take for so much work: as many as torch is set to, each with `least` to do."""
    return max(1, min(torch.get_num_threads(), work // least))


@cache
def _team() -> Callable[[int, int, int, int], None] | None:
    """`GOMP_parallel`, by which C compilers begin a parallel region, of the OpenMP that torch is linked to;
    None where that is of another kind."""
    try:
        parallel = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).GOMP_parallel
    except (OSError, AttributeError):
        return None
    parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    parallel.restype = None
    return parallel


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="strobe-kernel")


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a fork has none of its parent's threads
