"""Kernels written in Python, compiled by numba on first use and kept on disk.

A rung keeps its kernels in a module of its own, `<rung>_kernel`, which is imported when the rung first
runs: numba takes half a second to import, and this module imports none.

    def refusals(problem):
        return [*jit.refusals(), ...]

    def run(problem, x, projection, out):
        jit.kernels("strobe.linear.numba_tiled_kernel").multiply(x.data_ptr(), ...)

Kernels take addresses and sizes as integers, each of which costs a call some 30 ns where an array view
of a tensor costs 500. They run without the interpreter's lock.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import logging
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from strobe.cpu.cache import folder

FASTMATH = {"reassoc", "contract", "nsz", "arcp"}
"""Sums may be reordered and products contracted with additions; NaN and infinity keep their meaning."""

_log = logging.getLogger(__name__)
_one_at_a_time = threading.Lock()  # numba's cache folder is one for the process


@cache
def refusals() -> list[str]:
    """Why nothing can be compiled here."""
    if importlib.util.find_spec("numba") is None:
        return ["needs numba: pip install 'strobe[cpu]'"]
    return []


def to_compile() -> bool:
    """True where the cache holds no kernel of this version: the first calls take seconds, once."""
    return not refusals() and next((folder() / _version()).rglob("*.nbc"), None) is None


@cache
def kernels(module: str) -> ModuleType:
    """The module of this name. Importing it compiles its kernels, or reads them from the cache."""
    with _uninterrupted():
        return importlib.import_module(module)


def compiled(signature: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator: machine code for arguments of these types, `"void(intp, float32)"`."""
    import numba

    def compile(function: Callable[..., Any]) -> Callable[..., Any]:
        return _compile(numba.njit, signature, function, nogil=True, fastmath=FASTMATH)

    return compile


class Kernel(NamedTuple):
    """A C function of one argument, the address of int64s; `threads` says what stands there and runs it."""

    address: int
    call: Callable[[int], None]
    """It, without the interpreter's lock."""
    code: Any
    """What keeps it in memory."""


def kernel(function: Callable[[int], None]) -> Kernel:
    """A decorator: a function of an address as machine code that any thread may call."""
    import numba

    code = _compile(numba.cfunc, "void(intp)", function, fastmath={"contract"})
    return Kernel(code.address, code.ctypes, code)


def _compile(
    compiler: Callable[..., Any], signature: str, function: Callable[..., Any], **options: Any
) -> Any:
    """Machine code of a function, from the cache where it is there."""
    start = time.perf_counter()
    options["error_model"] = "numpy"
    try:
        with _uninterrupted(), _one_at_a_time, _cache_folder():
            machine_code = compiler(signature, cache=True, **options)(function)
    except (OSError, RuntimeError) as error:  # a folder that cannot be written, a full disk
        warnings.warn(
            f"compiled kernels are kept in memory only: {error} "
            "(hint: set STROBE_CACHE_DIR to a folder that can be written)",
            RuntimeWarning,
            stacklevel=3,
        )
        machine_code = compiler(signature, **options)(function)
    _log.info("%s ready in %.2f s", function.__qualname__, time.perf_counter() - start)
    return machine_code


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits until the block is done.

    numba imports parts of itself as it compiles; one that is broken off half-way is registered twice at the
    next try, and nothing compiles in this process any more.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    came = False

    def note(*_: object) -> None:
        nonlocal came
        came = True

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            signal.raise_signal(signal.SIGINT)


@contextmanager
def _cache_folder() -> Iterator[None]:
    """numba's cache is in strobe's own folder while a kernel is defined. NUMBA_CACHE_DIR goes before it, and
    numba's usual places come after it where it cannot be written."""
    from numba.core import config

    was = config.CACHE_DIR
    if not was:
        config.CACHE_DIR = str(folder() / _version())
    try:
        yield
    finally:
        config.CACHE_DIR = was


@cache
def _version() -> str:
    """numba knows a kernel by its own file; what kernels share is in this folder."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
