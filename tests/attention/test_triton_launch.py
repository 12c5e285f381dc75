"""Triton kernels as strobe keeps and launches them: what is compiled without a GPU, how it is called."""

from __future__ import annotations

import ctypes
import re
from ctypes import c_float, c_int32
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from strobe.attention import triton_launch
from strobe.attention.cases import Case
from strobe.attention.prefill import triton_fused
from strobe.attention.triton_launch import Kernel, LongStride, Rows, Stride, Variant
from strobe.errors import CompileError

pytest.importorskip("triton")
MERGE = Kernel("strobe.attention.decode.triton_split_kernel", "merge")
SIZES = {".u64": 8, ".u32": 4, ".f32": 4, ".u8": 1}


@pytest.fixture(autouse=True)
def _folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STROBE_CACHE_DIR", str(tmp_path / "strobe"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))


def parameters(ptx: str) -> list[int]:
    """Bytes of each parameter of the one kernel in this PTX."""
    found = re.findall(r"\.param (?:\.align \d+ )?(\.\w+) .*?(?:\[(\d+)\])?[,\n]", ptx.partition(".entry")[2])
    return [int(count) if count else SIZES[kind] for kind, count in found]


def size(argument: Any) -> int:
    return 8 if argument is None or isinstance(argument, torch.Tensor) else ctypes.sizeof(argument)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_arguments_are_packed_as_the_machine_code_takes_them(
    arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Any, ...]] = []
    monkeypatch.setattr(triton_fused, "bind", lambda *args, **options: seen.append((args, options)))
    inputs = Case("", ((70, 90),) * 2, 4, 2, 64, causal=True).inputs(torch.bfloat16)
    rows = [triton_fused._as_rows(tensor) for tensor in (inputs.q, inputs.k, inputs.v)]
    config = triton_fused.OTHERS[-1]
    triton_fused._prepare(inputs.problem, rows, torch.empty_like(inputs.q), None, config)
    ((kernel, grid, arguments, constants), options) = seen[0]
    assert grid == (2, 8)
    types = tuple(map(triton_launch._type, arguments))
    built = triton_launch.build(Variant(kernel, types, tuple(constants.items()), **options), arch)
    facts = triton_launch.launch_facts(built)
    assert bool(facts["maps"]) == (arch == "sm_90a")
    monkeypatch.setattr(triton_launch, "tensor_map", lambda *args, **options: (ctypes.c_uint64 * 16)())
    assert [size(each) for each in triton_launch.pack(arguments, facts)] == parameters(built.asm["ptx"])


def variant(**changes: Any) -> Variant:
    types = ("*fp32:16",) * 3 + ("*bf16:16", "*bf16:16", "i32:16", "i32:16", "i32")
    constants = (("HEAD_DIM", 64), ("SPLITS", 4), ("WITH_LSE", False))
    return Variant(
        **{"kernel": MERGE, "types": types, "constants": constants, "warps": 4, "stages": 3, **changes}
    )


def test_compiled_once_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    first = triton_launch.compile(variant(), "sm_90a")
    assert first.image.startswith(b"\x7fELF")
    monkeypatch.setattr(triton_launch, "build", lambda *_: pytest.fail("compiled again"))
    assert triton_launch.compile(variant(), "sm_90a") == first


def test_code_that_wants_scratch_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    built = SimpleNamespace(metadata=SimpleNamespace(global_scratch_size=64, profile_scratch_size=0))
    monkeypatch.setattr(triton_launch, "build", lambda *_: built)
    with pytest.raises(CompileError, match="wants scratch memory for merge on sm_90a"):
        triton_launch.compile(variant(), "sm_90a")


@pytest.mark.parametrize(
    "changes",
    [{"warps": 8}, {"stages": 2}, {"constants": (("HEAD_DIM", 128), ("SPLITS", 4), ("WITH_LSE", False))}],
    ids=str,
)
def test_another_variant_is_another_entry(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    triton_launch.compile(variant(), "sm_90a")

    class CompiledError(Exception): ...

    def build(*_: Any) -> None:
        raise CompiledError

    monkeypatch.setattr(triton_launch, "build", build)
    for other, arch in ((variant(**changes), "sm_90a"), (variant(), "sm_80")):
        with pytest.raises(CompiledError):
            triton_launch.compile(other, arch)


def test_types_tell_what_may_be_read_sixteen_bytes_at_a_time() -> None:
    wide = torch.empty(64, dtype=torch.bfloat16)
    start = -wide.data_ptr() % 16 // 2
    arguments = (
        *(wide[start:], wide[start + 1 :], Rows(torch.empty(8, 128), (4, 64))),
        *(c_int32(32), Stride(32), Stride(33), LongStride(32), LongStride(1), c_float(0.5)),
    )
    assert [*map(triton_launch._type, arguments)] == [
        *("*bf16:16", "*bf16", "tensordesc<fp32[4, 64]>"),
        *("i32", "i32:16", "i32", "i64:16", "i64", "fp32"),
    ]


def test_a_kernel_that_is_kept_needs_no_triton() -> None:
    import subprocess
    import sys

    triton_launch.compile(variant(), "sm_90a")
    code = f"""
import sys
from strobe.attention import triton_launch
from strobe.attention.triton_launch import Kernel, Variant
triton_launch.compile({variant()!r}, "sm_90a")
assert "triton" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
