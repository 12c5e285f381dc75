"""Kernels on several cores: Python's own threads, which compiled code runs in without the interpreter's lock.

numba's thread pools and torch's would wait for one another on the same cores; here a kernel takes as
many threads as torch is set to.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache

import torch


def parts(count: int, most: int) -> list[tuple[int, int]]:
    """`[0, count)` in as many even ranges as torch has threads, `most` and one at least."""
    n = max(1, min(torch.get_num_threads(), most, count))
    return [(count * i // n, count * (i + 1) // n) for i in range(n)]


def run(call: Callable[[int, int], object], ranges: list[tuple[int, int]]) -> None:
    """`call(begin, end)` for every range, the first one by the caller's own thread."""
    others = [_pool().submit(call, *each) for each in ranges[1:]]
    try:
        call(*ranges[0])
    finally:
        wait(others)  # which write into the caller's memory
    for future in others:
        future.result()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="strobe-kernel")


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a fork has none of its parent's threads
