"""A compiled source: the machine code, and what the compiler said about it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Resources:
    """What one kernel takes, as the assembler reports it. Bytes but for `registers`, which is per thread."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    static_shared: int

    @property
    def spills(self) -> int:
        """Bytes a thread writes to and reads from local memory because registers ran out."""
        return self.spill_stores + self.spill_loads

    def __str__(self) -> str:
        shared = f"{self.static_shared} B static shared"
        return f"{self.registers} registers, {shared}, {self.stack} B stack, {self.spills} B spills"


_ENTRY = re.compile(r"Compiling entry function '([^']+)'")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


def arch_number(arch: str) -> int:
    """Ten times the compute capability: 90 of "sm_90a"."""
    return int(arch.removeprefix("sm_").rstrip("af"))


@dataclass(frozen=True)
class Cubin:
    """Machine code of one source for one arch.

    `name` is the source's file name, `defines` the macros it was compiled with, `image` the ELF,
    `log` the compiler's and assembler's output.
    """

    name: str
    arch: str
    defines: tuple[tuple[str, str], ...]
    image: bytes
    log: str

    @cached_property
    def _resources(self) -> dict[str, Resources]:
        found = {}
        parts = _ENTRY.split(self.log)
        for entry, report in zip(parts[1::2], parts[2::2], strict=True):
            frame, used, shared = _FRAME.search(report), _USED.search(report), _SHARED.search(report)
            if frame and used:
                found[entry] = Resources(
                    registers=int(used[1]),
                    stack=int(frame[1]),
                    spill_stores=int(frame[2]),
                    spill_loads=int(frame[3]),
                    static_shared=int(shared[1]) if shared else 0,
                )
        return found

    def resources(self) -> dict[str, Resources]:
        """Registers, stack, spills and static shared memory of each kernel in it, by kernel name."""
        return dict(self._resources)
