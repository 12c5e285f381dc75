"""What there is to compile: the sources that the module beside each .cu file asks for."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

import strobe
from strobe.cuda.jit import Source, arch_number, supported_archs

PACKAGE = Path(strobe.__file__).parent


def every(arch: str) -> list[Source]:
    """The package's sources for "sm_90a" or another arch, with their defines."""
    found: list[Source] = []
    for path in sorted(PACKAGE.rglob("*.cu")):
        name = ".".join(("strobe", *path.relative_to(PACKAGE).with_suffix("").parts))
        if importlib.util.find_spec(name) and hasattr(module := importlib.import_module(name), "sources"):
            found += module.sources(arch)
    return found


def archs() -> list[str]:
    """What every source compiles for: bfloat16 asks for compute capability 8.0."""
    return [arch for arch in supported_archs() if arch_number(arch) >= 80]


def name_of(source: Source) -> str:
    """ "attention/decode/cuda_paged"."""
    return source.path.relative_to(PACKAGE).with_suffix("").as_posix()
