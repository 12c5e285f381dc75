"""A .cu and its headers to a shared library, by g++.

The sources are staged: what `strobe.cuda.nvrtc` reads is written out, but for the headers that hold
PTX, which `include/` has under the same names. Two things are put in other words on the way: dynamic
shared memory, which is an array of unknown size in CUDA, and the list of kernels, appended.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from strobe import settings
from strobe.cuda import nvrtc

HERE = Path(__file__).parent
TWINS = HERE / "include"

_RUNTIME = ("runtime.cpp", "engines.cpp", "races.cpp")
_COMMON = (
    "-std=c++20",
    "-fPIC",
    "-U_FORTIFY_SOURCE",
    "-fvisibility=hidden",
    "-fno-gnu-unique",
    "-ffp-contract=fast",
    "-march=native",
    "-g1",
)
_KERNEL = (
    *_COMMON, "-O1", "-w", "-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0",
    "-fno-strict-aliasing",
)  # fmt: skip
_DYNAMIC = re.compile(r"extern\s+__shared__\s+(?:__align__\((\d+)\)\s+)?([\w ]+?)\s+(\w+)\[\];")
_BOUNDS = re.compile(r"__launch_bounds__\s*\((?:[^()]|\([^()]*\))*\)")


class BuildError(Exception):
    """g++ does not take the kernel; the message is what it says."""


def missing() -> str | None:
    """Why kernels cannot be emulated here; None where they can."""
    if shutil.which("g++") is None:
        return "g++ is not installed: the emulator compiles kernels with it"
    number = int(_gxx("-dumpversion").split(".")[0])
    return None if number >= 11 else f"g++ {number}; the emulator needs C++20 as of g++ 11"


def library(source: Path, defines: Mapping[str, nvrtc.Define]) -> Path:
    """The library of a source with these macros, from the cache or built and kept."""
    program = nvrtc.program(source, defines, "emulated")
    sources = {program.name: _with_kernels(program.source), **dict(program.headers)}
    macros = [f"-D{name}={value}" for name, value in program.defines]
    parts = [_emulator_digest(), *macros, *(part for pair in sorted(sources.items()) for part in pair)]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    target = _folder() / f"{source.stem}-{digest}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=_folder()) as stage:
            for name, text in sources.items():
                path = Path(stage, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                if not (TWINS / name).exists():
                    path.write_text(f'#line 1 "{name}"\n{text}')
            made = Path(stage, "kernel.o")
            includes = [f"-I{stage}", f"-I{TWINS}", f"-I{HERE}", "-include", str(HERE / "device.h")]
            _gxx(
                *_KERNEL,
                *macros,
                *includes,
                "-x",
                "c++",
                "-c",
                str(Path(stage, program.name)),
                "-o",
                str(made),
            )
            _link(target, *_runtime(), made)
    return target


def _with_kernels(text: str) -> str:
    text = _DYNAMIC.sub(
        r"\2* const \3 = static_cast<\2*>(emulator::dynamic_shared(\1 + 0 ? \1 + 0 : alignof(\2)));", text
    )
    heads = _BOUNDS.sub("", text).split('extern "C" __global__')[1:]
    names = [re.search(r"\bvoid\s+(\w+)\s*\(", head)[1] for head in heads]  # type: ignore[index]
    return text + "".join(f"\nEMULATOR_KERNEL({name})" for name in names) + "\n"


@cache
def _runtime() -> tuple[Path, ...]:
    made = []
    for name in _RUNTIME:
        path = _folder() / f"{Path(name).stem}-{_emulator_digest()[:24]}.o"
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=_folder()) as stage:
                fresh = Path(stage, path.name)
                includes = [f"-I{HERE}", f"-I{TWINS}"]
                _gxx(*_COMMON, "-O2", *includes, "-c", str(HERE / name), "-o", str(fresh))
                os.replace(fresh, path)
        made.append(path)
    return tuple(made)


def _link(target: Path, *objects: Path) -> None:
    fresh = objects[-1].with_suffix(".so")
    _gxx("-shared", "-Wl,-Bsymbolic,-z,defs", *map(str, objects), "-o", str(fresh))
    os.replace(fresh, target)


def source_line(built: Path, offset: int) -> str:
    """Where in the sources an instruction stands, with what it was inlined into."""
    if shutil.which("addr2line") is None:
        return f"offset {offset:#x}"
    command = ["addr2line", "-e", str(built), "-i", "-s", hex(offset - 1)]
    lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split("\n")
    return " in ".join(line.split(" ")[0] for line in lines if line)


@cache
def _emulator_digest() -> str:
    """Of all that shapes a library besides its sources: this folder, the compiler, the processor."""
    digest = hashlib.sha256()
    for path in sorted([*HERE.glob("*.h"), *HERE.glob("*.cpp"), *TWINS.iterdir(), Path(__file__)]):
        digest.update(path.read_bytes())
    digest.update(_gxx("-march=native", "-###", "-E", "-x", "c++", "/dev/null").encode())
    return digest.hexdigest()


@cache
def _folder() -> Path:
    path = settings.load().cache_dir / "emulator"
    path.mkdir(parents=True, exist_ok=True)
    return path


def _gxx(*arguments: str) -> str:
    done = subprocess.run(["g++", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"g++ {' '.join(arguments)}\n{done.stderr[:4000]}")
    return done.stdout + done.stderr
