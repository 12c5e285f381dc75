"""Every CUDA source compiles for each arch it is meant for; what its kernels take is shown at the end of
the run, and spills are refused in production rungs."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import strobe
from strobe.attention import AttentionProblem, Packed, Paged, ladder
from strobe.attention.prefill import cuda_hopper
from strobe.cuda import jit
from strobe.linear import ladder as linear_ladder
from strobe.linear.problem import LinearProblem

PACKAGE = Path(strobe.__file__).parent
SOURCES = sorted(path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.cu"))
ARCHS = ["sm_80", "sm_89", "sm_90a", "sm_120"]
TEACHING = {
    f"attention/prefill/cuda_{name}"
    for name in ("split", "fused_scalar", "fused_warp", "tensor_core", "dim_tiled", "split_kv")
}
SCORES: dict[str, Any] = {"softcap": 30.0, "sinks": (0.0,)}
PACKED: dict[str, Any] = {"layout": Packed((), ())}
PAGED: dict[str, Any] = {"layout": Paged(None, None), "page_size": 8}
sources = pytest.mark.parametrize("source", SOURCES, ids=str)


def module_of(source: Path) -> ModuleType:
    """The Python module beside a CUDA source."""
    return importlib.import_module(".".join(("strobe", *source.parts)))


def reasons_against(rung: ModuleType, arch: str) -> set[str]:
    """What the rung has against a GPU of this arch, and not against Hopper."""

    def refusals(number: int) -> set[str]:
        if ".linear." in rung.__name__:
            return set(rung.refusals(LinearProblem(1, 64, 64, "bfloat16", device="cuda", arch=number)))
        return set(rung.refusals(AttentionProblem(1, 64, 64, 2, 2, 64, device="cuda", arch=number)))

    return refusals(int(arch.removeprefix("sm_").removesuffix("a"))) - refusals(90)


@sources
@pytest.mark.parametrize("arch", ARCHS)
def test_compiles_without_spills(source: Path, arch: str, record_property: pytest.RecordProperty) -> None:
    jobs = list(module_of(source).sources(arch))
    if not jobs:
        assert source.parts[0] == "bench" or reasons_against(module_of(source), arch), (
            f"neither builds for {arch} nor refuses it"
        )
        return
    spilling = []
    for job in jobs:
        cubin = jit.compile(job.path, job.defines, arch)
        assert cubin.image.startswith(b"\x7fELF")
        assert cubin.resources(), f"no kernel in {job.path.name}:\n{cubin.log}"
        for entry, taken in cubin.resources().items():
            defines = " ".join(f"{name}={value}" for name, value in job.defines.items())
            line = f"{job.path.stem:18} {entry:14} {arch:7} {taken}  ({defines})"
            record_property("kernel", line)
            if taken.spills:
                spilling.append(line)
    assert source.as_posix() in TEACHING or not spilling, "\n".join(spilling)


@pytest.mark.parametrize(
    ("head_dim", "features"),
    [
        *((head_dim, SCORES) for head_dim in cuda_hopper.HEAD_DIMS),
        *((256, features) for features in (PACKED, PACKED | SCORES, PAGED | SCORES)),
        (128, PAGED),
    ],
)
def test_no_feature_of_the_hopper_rung_spills_or_serialises(head_dim: int, features: dict[str, Any]) -> None:
    problem = AttentionProblem(1, 64, 64, 1, 1, head_dim, window=(64, 32), device="cuda", arch=90, **features)
    source = jit.Source(cuda_hopper._SOURCE, cuda_hopper.defines(problem, cuda_hopper.TILES[head_dim]))
    cubin = jit.compile(*source, "sm_90a")
    assert cubin.resources()["attend"].spills == 0
    assert "serialized" not in cubin.log  # a product waits for the one before


@sources
def test_is_compiled_for_some_arch(source: Path) -> None:
    """A source that no arch builds would never be tested; each belongs to a rung, ops or a bench."""
    module = module_of(source)
    assert any(list(module.sources(arch)) for arch in ARCHS)
    rungs = {rung.module for rung in (*ladder.RUNGS.values(), *linear_ladder.RUNGS.values())}
    assert module in rungs or source.parts[0] in ("ops", "bench")
