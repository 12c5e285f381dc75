"""CUDA C++ to machine code through NVRTC. Needs no GPU, no driver and no toolkit headers."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from strobe.cuda.bindings import load
from strobe.cuda.cubin import Cubin
from strobe.errors import CompileError

INCLUDE = Path(__file__).parent / "include"

Define = str | int | float | bool

_OPTIONS = ("--std=c++17", "-default-device", "-lineinfo", "--no-cache", "--ptxas-options=-v")
_INCLUDE_LINE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*[<"]([^>"\n]+)[>"]', re.MULTILINE)
_ERROR_LINE = re.compile(r"^(.+?\(\d+\)): (?:catastrophic |fatal )?error[^:]*: (.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Program:
    """Everything a compilation reads, read once: what is hashed is what is compiled."""

    name: str
    source: str
    headers: tuple[tuple[str, str], ...]
    defines: tuple[tuple[str, str], ...]
    arch: str

    @property
    def key(self) -> str:
        """Hex digest of source, headers, defines, arch, options and NVRTC's version."""
        parts = [self.name, self.source, self.arch, *_OPTIONS, version()]
        parts += [text for pair in (*self.headers, *self.defines) for text in pair]
        digest = hashlib.sha256()
        for part in parts:
            data = part.encode()
            digest.update(len(data).to_bytes(8, "little") + data)
        return digest.hexdigest()


def program(source: Path, defines: Mapping[str, Define], arch: str) -> Program:
    """Read `source` and, recursively, what it includes (from its own folder, then cuda/include)."""
    headers: dict[str, str] = {}
    try:
        text = source.read_text()
        _gather(source.name, text, source.parent, headers)
    except OSError as error:
        raise CompileError(f"{error.filename}: {error.strerror}") from error
    spelled = tuple((name, _spell(name, value)) for name, value in sorted(defines.items()))
    return Program(source.name, text, tuple(sorted(headers.items())), spelled, arch)


def _gather(name: str, text: str, folder: Path, headers: dict[str, str]) -> None:
    for match in _INCLUDE_LINE.finditer(text):
        wanted = match[1]
        if wanted in headers:
            continue
        found = next((path for path in (folder / wanted, INCLUDE / wanted) if path.is_file()), None)
        if found is None:
            line = text.count("\n", 0, match.start()) + 1
            raise CompileError(
                f"{name}({line}): no header {wanted!r} beside the source or in strobe/cuda/include",
                hint="kernels use no toolkit headers; types.cuh has the numeric types",
            )
        headers[wanted] = found.read_text()
        _gather(wanted, headers[wanted], found.parent, headers)


def _spell(name: str, value: Define) -> str:
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float) and (value != value or value in (float("inf"), -float("inf"))):
        raise CompileError(f"define {name} is {value}; supported: finite numbers")
    return str(value)


@cache
def version() -> str:
    """NVRTC's version: its package's where it came as one (cheap), its own answer (loads it) elsewhere."""
    import importlib.metadata

    try:
        return importlib.metadata.version("nvidia-cuda-nvrtc")
    except importlib.metadata.PackageNotFoundError:
        return ".".join(str(part) for part in _check(_bindings().nvrtcVersion()))


def supported_archs() -> list[str]:
    """What this NVRTC compiles for, as "sm_90". Suffixed archs ("sm_90a") are not listed but work."""
    return [f"sm_{arch}" for arch in _check(_bindings().nvrtcGetSupportedArchs())[0]]


def build(program: Program) -> Cubin:
    """Compile.

    Raises:
        CompileError: with the compiler's first error and the source line it stands on.
        DeviceError: NVRTC is not installed.
    """
    nvrtc = _bindings()
    headers = [text.encode() for _, text in program.headers]
    names = [name.encode() for name, _ in program.headers]
    handle = _check(
        nvrtc.nvrtcCreateProgram(program.source.encode(), program.name.encode(), len(headers), headers, names)
    )[0]
    try:
        options = [f"--gpu-architecture={program.arch}", *_OPTIONS]
        options += [f"--define-macro={name}={value}" for name, value in program.defines]
        (status,) = nvrtc.nvrtcCompileProgram(handle, len(options), [option.encode() for option in options])
        raw_log = _text(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, handle)
        log = raw_log.decode(errors="replace").strip("\0 \n")
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise CompileError(_explain(program, log or status.name))
        image = _text(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, handle)
    finally:
        nvrtc.nvrtcDestroyProgram(handle)
    return Cubin(program.name, program.arch, program.defines, image, log)


def _text(size_of: Any, read: Any, handle: Any) -> bytes:
    data = bytearray(_check(size_of(handle))[0])
    _check(read(handle, data))
    return bytes(data)


def _explain(program: Program, log: str) -> str:
    """The first error, the source line it points at, and how many more there are."""
    defines = " ".join(f"{name}={value}" for name, value in program.defines)
    where = f"{program.name} for {program.arch}" + (f" with {defines}" if defines else "")
    errors = list(_ERROR_LINE.finditer(log))
    if not errors:
        return f"{where} does not compile: {' '.join(log.split())}"
    place, message = errors[0].groups()
    file, _, line = place.rpartition("(")
    texts = dict(program.headers) | {program.name: program.source}
    source = texts.get(file, "").splitlines()
    number = int(line.rstrip(")"))
    quoted = f": `{source[number - 1].strip()}`" if 0 < number <= len(source) else ""
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return f"{where} does not compile: {place}: {message.strip()}{quoted}{more}"


def _bindings() -> Any:
    hint = "pip install 'strobe[gpu]' brings cuda-bindings and nvidia-cuda-nvrtc"
    return load("nvrtc", "nvrtcVersion", "NVRTC", hint)


def _check(answer: tuple[Any, ...]) -> tuple[Any, ...]:
    status, *values = answer
    if status.value:
        raise CompileError(f"NVRTC answers {status.name}")
    return tuple(values)
