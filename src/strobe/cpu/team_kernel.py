"""How helpers join the kernel of another thread: by a board of int64s that all of them see.

Nobody is waited for who has not come: parts are taken one by one, so a helper whose core runs another program
was not needed, and finds the kernel closed. Only who is at a part is waited for.
"""

from __future__ import annotations

from strobe.cpu import atomic
from strobe.cpu.jit import compiled
from strobe.cpu.kernel import longs

LOCK, STATE, JOB, BYTES = 0, 64, 128, 192
"""Where things stand on the board, each in a line of the cache of its own, and how long it is.

LOCK: 1 while somebody has a kernel on the board. STATE: 1 while it is open, and 2 for each who has joined.
JOB: the kernel, its argument, how many may join, and which kernel it is, counted from 1.
"""
_AWAKE, _DROWSY = 5_000, 2_000
"""Looks at the board that wait a tenth of a millisecond in all; then looks between naps, 0.1 s or longer."""


@compiled("void(intp, intp, intp, intp)")
def lead(board_at, kernel_at, call_at, helpers):
    """Call a kernel, and let so many helpers join; alone where the board is taken."""
    if not atomic.replace(board_at + LOCK, 0, 1):
        atomic.call(kernel_at, call_at)
        return
    job = longs(board_at + JOB, (4,))
    job[0], job[1], job[2], job[3] = kernel_at, call_at, helpers, job[3] + 1
    atomic.store(board_at + STATE, 1)
    atomic.call(kernel_at, call_at)
    atomic.add(board_at + STATE, -1)
    looks = 0
    while atomic.load(board_at + STATE) != 0:
        looks += 1
        if looks < _AWAKE:
            atomic.pause()
        else:  # a helper has lost its core, and may have this one
            atomic.nap()
    atomic.store(board_at + LOCK, 0)


@compiled("void(intp)")
def help(board_at):
    """Join every kernel on the board once, until there has been none for a while."""
    job = longs(board_at + JOB, (4,))
    last, looks = 0, 0
    while looks < _AWAKE + _DROWSY:
        state = atomic.load(board_at + STATE)
        is_open = state % 2 == 1 and state // 2 < job[2] and job[3] != last
        if is_open and atomic.replace(board_at + STATE, state, state + 2):
            last, looks = job[3], 0
            atomic.call(job[0], job[1])
            atomic.add(board_at + STATE, -2)
        elif looks < _AWAKE:
            atomic.pause()
            looks += 1
        else:
            atomic.nap()
            looks += 1
