"""Kernels on several cores: helpers join a kernel when they come, and nobody waits for them.

A helper that waits awake joins within 0.2 us. A pool of Python's threads takes 25 to begin. OpenMP's team, of
torch's own loops, takes 1, but its leader waits for every member: milliseconds where another program has the
core.
"""

from __future__ import annotations

import atexit
import os
import threading
from array import array
from collections import deque
from collections.abc import Iterable
from functools import cache

import torch

from strobe.cpu import jit

STATUS = 1
"""Which of its int64s a kernel may say something in; 0 at first. The one before it counts the parts that are
taken (`kernel.take`), and behind it are the numbers that the kernel is given."""


def run(kernel: jit.Kernel, numbers: Iterable[int], threads: int) -> int:
    """Call a kernel in up to so many threads at once, which share its parts. Returns its status.

    As C code does, it reads and writes at the addresses among its numbers.
    """
    block = array("q", (0, 0, *numbers))
    address = block.buffer_info()[0]
    if threads == 1:
        kernel.call(address)
    else:
        _team().run(kernel.address, address, threads - 1)
    return block[STATUS]


def worth(work: int, least: int) -> int:
    """How many threads to take for so much work: as many as torch is set to, each with `least` to do."""
    return max(1, min(torch.get_num_threads(), work // least))


class _Team:
    """A board, and helpers who look at it."""

    def __init__(self) -> None:
        self._code = jit.kernels("strobe.cpu.team_kernel")
        self._board = array("q", bytes(self._code.BYTES + 64))
        self._at = -(-self._board.buffer_info()[0] // 64) * 64
        self._helpers: list[threading.Thread] = []
        self._asleep: deque[threading.Semaphore] = deque()
        self._dismissed = False

    def run(self, kernel: int, call: int, helpers: int) -> None:
        while len(self._helpers) < helpers:
            self._helpers.append(threading.Thread(target=self._help, name="strobe-kernel", daemon=True))
            self._helpers[-1].start()
        self._wake()
        self._code.lead(self._at, kernel, call, helpers)

    def _help(self) -> None:
        bed = threading.Semaphore(0)
        while not self._dismissed:
            self._code.help(self._at)
            self._asleep.append(bed)
            bed.acquire()

    def _wake(self) -> None:
        while self._asleep:
            self._asleep.popleft().release()

    def dismiss(self) -> None:
        """Let helpers go, before the code that they run does."""
        self._dismissed = True
        for helper in self._helpers:
            while helper.is_alive():
                self._wake()
                helper.join(0.01)


@cache
def _team() -> _Team:
    team = _Team()
    atexit.register(team.dismiss)
    return team


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_team.cache_clear)  # a fork has none of its parent's threads
