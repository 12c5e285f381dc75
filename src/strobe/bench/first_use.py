"""How long each rung's first call takes: with nothing compiled, and in a new process with all of it kept.

The machine's libraries are imported, its GPU is in use and has multiplied once; from there to the result is
counted. A child process imports them, and forks for each call.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from strobe.attention import ladder
from strobe.attention.cases import Case
from strobe.attention.check import verdict
from strobe.errors import KernelRefusedError
from strobe.linear import Projection, empty_weight
from strobe.linear import ladder as linear
from strobe.linear.problem import LinearProblem
from strobe.ops.softmax import softmax

_OURS = ("cuda_", "triton_", "numba_")
_LIBRARY = "torch_naive"
"""Compiles nothing: what the library's own kernels take to load, in rungs that stand on them too."""
_CASES = {
    "prefill": Case("first_use", ((512, 512),), 8, 2, 128, causal=True),
    "decode": Case("first_use", ((1, 512),), 8, 2, 128, layout="paged", causal=True),
}
_INPUTS, _OUTPUTS = 1024, 2048
_TOKENS = {"cuda_wgmma": 32}
"""For one token where a rung is not named here."""


class Subject(NamedTuple):
    """`call` runs a rung; `right` judges what it gave."""

    call: Callable[[], torch.Tensor]
    right: Callable[[torch.Tensor], bool]


def subjects(device: str) -> dict[str, Callable[[], Subject]]:
    """By name, what makes the inputs of each rung that compiles something for this device."""
    found: dict[str, Callable[[], Subject]] = {}
    for rung in (*ladder.PREFILL, *ladder.DECODE):
        ours = rung.name == _LIBRARY or any(kind in rung.name for kind in _OURS)
        if ours and not _elsewhere(rung.name, device):
            found[str(rung)] = partial(_attention, rung, device)
    for name in linear.RUNGS:
        if name.startswith(_OURS) and not _elsewhere(name, device):
            found[f"linear/{name}"] = partial(_linear, name, device)
    if device == "cuda":
        found["ops/softmax"] = partial(_softmax, device)
    return found


def _elsewhere(name: str, device: str) -> bool:
    return name != _LIBRARY and name.startswith("numba_") == (device == "cuda")


def _attention(rung: ladder.Rung, device: str) -> Subject:
    inputs = _CASES[rung.phase].inputs(_dtype(device), device)
    problem, out = inputs.problem, torch.full_like(inputs.q, float("nan"))
    if reasons := rung.refusals(problem):
        raise KernelRefusedError(", ".join(reasons))

    def call() -> torch.Tensor:
        rung.run(problem, inputs.q, inputs.k, inputs.v, out, None)
        return out

    return Subject(call, lambda out: verdict(problem, inputs.q, inputs.k, inputs.v, out).right)


def _linear(name: str, device: str) -> Subject:
    from strobe.device import gpu

    rung, kind, tokens = linear.RUNGS[name], _dtype(device), _TOKENS.get(name, 1)
    dtype, arch = str(kind).removeprefix("torch."), gpu().arch if device == "cuda" else 0
    input_major = device == "cpu"  # as `empty_weight` lays them
    problem = LinearProblem(
        tokens, _INPUTS, _OUTPUTS, dtype, device=device, arch=arch, input_major=input_major
    )
    if reasons := rung.refusals(problem):
        raise KernelRefusedError(", ".join(reasons))
    weight = empty_weight(_OUTPUTS, _INPUTS, device=device, dtype=kind).normal_(0.0, _INPUTS**-0.5)
    projection, x = Projection(weight), torch.randn(tokens, _INPUTS, device=device).to(kind)
    out = torch.full((tokens, _OUTPUTS), float("nan"), dtype=kind, device=device)

    def call() -> torch.Tensor:
        rung.run(problem, x, projection, out)
        return out

    return Subject(call, lambda out: torch.allclose(out, x @ weight.T, atol=0.05, rtol=0.02))


def _dtype(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


def _softmax(device: str) -> Subject:
    x = torch.randn(64, 512, device=device).to(torch.bfloat16)
    return Subject(lambda: softmax(x), lambda out: torch.allclose(out, x.softmax(-1), atol=1e-3, rtol=0.02))


def measure(device: str) -> Iterator[dict[str, Any]]:
    """Each rung's figures, or why it does not run. In a process that has not touched the GPU."""
    abreast = 2 if device == "cuda" else 1
    for library in ("triton", "numba"):
        if importlib.util.find_spec(library):
            importlib.import_module(library)
    made = subjects(device)
    with tempfile.TemporaryDirectory() as folder:
        kept = {name: Path(folder) / name for name in made}
        names = list(made)
        cold: dict[str, dict[str, Any]] = {}
        for i in range(0, len(names), abreast):
            some = names[i : i + abreast]
            cold |= zip(some, _forked([(made[name], device, kept[name]) for name in some]), strict=True)
        for name in names:
            if "refused" in cold[name]:
                yield {"rung": name, **cold[name]}
                continue
            (warm,) = _forked([(made[name], device, kept[name])])
            yield {
                "rung": name,
                "checked": cold[name]["right"] and warm["right"],
                "first_s": cold[name]["seconds"],
                "later_ms": 1e3 * warm["seconds"],
            }


def _forked(jobs: Sequence[tuple[Callable[[], Subject], str, Path]]) -> list[dict[str, Any]]:
    """What `_timed` gives for each, all at the same time, each in a process forked from this one."""
    readers, children = [], []
    for job in jobs:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                os.write(writer, json.dumps(_timed(*job)).encode())
            os._exit(0)
        os.close(writer)
        readers.append(reader)
        children.append(child)
    told = []
    for reader, child in zip(readers, children, strict=True):
        with os.fdopen(reader, "rb") as file:
            text = file.read()
        os.waitpid(child, 0)
        told.append(json.loads(text) if text else {"refused": "its process died"})
    return told


def _timed(make: Callable[[], Subject], device: str, folder: Path) -> dict[str, Any]:
    os.environ |= {"STROBE_CACHE_DIR": str(folder), "TRITON_CACHE_DIR": str(folder / "triton")}
    try:
        squares = torch.ones(2, 16, 16, device=device, dtype=torch.bfloat16)
        torch.bmm(squares, squares)
        subject = make()
        _done(device)
        start = time.perf_counter()
        out = subject.call()
        _done(device)
        return {"seconds": time.perf_counter() - start, "right": bool(subject.right(out))}
    except Exception as error:
        return {"refused": f"{error}"}


def _done(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    for each in measure(sys.argv[1]):
        sys.stdout.write(json.dumps(each) + "\n")
        sys.stdout.flush()
