"""A .cu and its headers to a shared library, by g++.

The sources are staged: what `strobe.cuda.nvrtc` reads is written out, but for the headers that hold
PTX, which `include/` has under the same names. Two things are put in other words on the way: dynamic
shared memory, which is an array of unknown size in CUDA, and the list of kernels, appended.
"""

from __future__ import annotations

import hashlib
import os
import platform
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

_RUNTIME = ("memory.cpp", "threads.cpp", "engines.cpp", "races.cpp")
_COMMON = "-std=c++20 -fPIC -fvisibility=hidden -fno-gnu-unique -U_FORTIFY_SOURCE -march=native -g1".split()
_KERNEL = [
    *_COMMON,
    *("-O1", "-w", "-fno-strict-aliasing"),
    *("-fexpensive-optimizations", "-ffp-contract=fast"),  # a b + c is one fma, as in CUDA
    "-fsanitize=thread,bounds,shift,integer-divide-by-zero",  # call memory.cpp at every access and mistake
    *("--param", "tsan-instrument-func-entry-exit=0"),
]
_DYNAMIC = re.compile(r"extern\s+__shared__\s+(?:__align__\((\d+)\)\s+)?([\w ]+?)\s+(\w+)\[\];")
_BOUNDS = re.compile(r"__launch_bounds__\s*\((?:[^()]|\([^()]*\))*\)")


class BuildError(Exception):
    """g++ does not take the kernel; the message is what it says."""


def missing() -> str | None:
    """Why kernels cannot be emulated here; None where they can."""
    if platform.system() != "Linux":
        return f"the emulator builds ELF libraries; this is {platform.system()}"
    if shutil.which("g++") is None:
        return "g++ is not installed: the emulator compiles kernels with it"
    version = _gxx("--version").splitlines()[0]
    number = int(_gxx("-dumpversion").split(".")[0])
    return None if "clang" not in version and number >= 11 else f"{version}; the emulator needs GCC 11 and up"


def library(source: Path, defines: Mapping[str, nvrtc.Define]) -> Path:
    """The library of a source with these macros, from the cache or built and kept.

    Raises:
        BuildError: g++ does not take it.
    """
    program = nvrtc.program(source, defines, "emulated")
    sources = {program.name: _with_kernels(program.source), **dict(program.headers)}
    macros = [f"-D{name}={value}" for name, value in program.defines]
    parts = [_emulator_digest(), *macros, *(part for pair in sorted(sources.items()) for part in pair)]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    target = _folder() / f"{source.stem}-{digest}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=_folder()) as stage:
            for name, text in sources.items():
                if not (TWINS / name).exists():
                    Path(stage, name).write_text(f'#line 1 "{name}"\n{text}')
            made, fresh = f"{stage}/kernel.o", f"{stage}/kernel.so"
            folders = [f"-I{folder}" for folder in (stage, TWINS, HERE)]
            ahead = ["-include", str(HERE / "device.h")]
            _gxx(*_KERNEL, *macros, *folders, *ahead, "-xc++", "-c", f"{stage}/{program.name}", "-o", made)
            _gxx("-shared", "-Wl,-Bsymbolic,-z,defs", *_runtime(), made, "-o", fresh)
            os.replace(fresh, target)
    return target


def _with_kernels(text: str) -> str:
    """The source with its dynamic shared memory as pointers, and each of its kernels named at its end."""
    heads = _BOUNDS.sub("", text).split('extern "C" __global__')[1:]
    names = [re.search(r"\bvoid\s+(\w+)\s*\(", head)[1] for head in heads]  # type: ignore[index]
    return _DYNAMIC.sub(_pointer, text) + "".join(f"\nEMULATOR_KERNEL({name})" for name in names) + "\n"


def _pointer(found: re.Match[str]) -> str:
    alignment, kind, name = found.groups()
    place = f"emulator::dynamic_shared({alignment or f'alignof({kind})'})"
    return f"{kind}* const {name} = static_cast<{kind}*>({place});"


@cache
def _runtime() -> tuple[str, ...]:
    """The runtime's objects. memory.cpp is first: with it begins the section of shared memory."""
    made = []
    for name in _RUNTIME:
        path = _folder() / f"{Path(name).stem}-{_emulator_digest()[:24]}.o"
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=_folder()) as stage:
                fresh = f"{stage}/{path.name}"
                _gxx(*_COMMON, "-O2", f"-I{HERE}", f"-I{TWINS}", "-c", str(HERE / name), "-o", fresh)
                os.replace(fresh, path)
        made.append(str(path))
    return tuple(made)


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
