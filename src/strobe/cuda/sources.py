"""What there is to compile: the sources that the module beside each .cu file asks for."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

import strobe
from strobe.cuda.jit import Source, arch_number, supported_archs
from strobe.errors import UnknownNameError

PACKAGE = Path(strobe.__file__).parent


def every(arch: str) -> list[Source]:
    """The package's sources for "sm_90a" or another arch, with their defines."""
    found: list[Source] = []
    for path in sorted(PACKAGE.rglob("*.cu")):
        name = ".".join(("strobe", *path.relative_to(PACKAGE).with_suffix("").parts))
        if importlib.util.find_spec(name) and hasattr(module := importlib.import_module(name), "sources"):
            found += module.sources(arch)
    return found


def check_arch(arch: str) -> str:
    """The arch, if every source compiles for it: bfloat16 asks for compute capability 8.0.

    Raises:
        UnknownNameError: the compiler does not know it, or it is older.
    """
    known = [each for each in supported_archs() if arch_number(each) >= 80]
    if (arch[:-1] if arch.endswith(("a", "f")) else arch) not in known:
        raise UnknownNameError.among("arch", arch, sorted([*known, "sm_90a"], key=arch_number))
    return arch


def name_of(source: Source) -> str:
    """ "attention/decode/cuda_paged"."""
    return source.path.relative_to(PACKAGE).with_suffix("").as_posix()
