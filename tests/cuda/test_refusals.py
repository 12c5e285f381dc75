"""What the CUDA rungs refuse, said by name; asked without a GPU."""

from __future__ import annotations

import importlib
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

from strobe.attention.problem import AttentionProblem, Packed, Paged
from strobe.cuda import jit
from strobe.linear import cuda_gemv, cuda_matmul_naive, cuda_matmul_tiled
from strobe.linear.problem import LinearProblem

NAMES = [
    "cuda_split",
    "cuda_fused_scalar",
    "cuda_fused_warp",
    "cuda_tensor_core",
    "cuda_dim_tiled",
    "cuda_split_kv",
]
RUNGS = [importlib.import_module(f"strobe.attention.prefill.{name}") for name in NAMES]
rungs = pytest.mark.parametrize("rung", RUNGS, ids=NAMES)


def problem(**changes: Any) -> AttentionProblem:
    fields = {"batch": 2, "q_len": 100, "kv_len": 200, "q_heads": 4, "kv_heads": 2, "head_dim": 64}
    return AttentionProblem(**{**fields, "device": "cuda", "arch": 90, **changes})


PACKED = Packed(torch.zeros(3, dtype=torch.int32), torch.zeros(3, dtype=torch.int32), 1, 1)
PAGED = Paged(torch.zeros(2, 4, dtype=torch.int32), torch.zeros(2, dtype=torch.int32), max_kv_len=1)


@rungs
def test_accepts_what_it_is_for(rung: ModuleType) -> None:
    head_dim = 1024 if rung.__name__.endswith("dim_tiled") else 128
    for causal in (False, True):
        assert rung.refusals(problem(causal=causal)) == []
        assert rung.refusals(problem(causal=causal, head_dim=head_dim, dtype="float16", arch=80)) == []
    assert rung.refusals(problem(q_len=0, kv_len=0)) == []


@rungs
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": "cpu", "arch": 0}, "tensors on cpu; needs an NVIDIA GPU"),
        ({"arch": 75}, "compute capability 7.5; supported: 8.0 and up"),
        ({"window": (32, 0)}, "window (32, 0); supported: none, or causal"),
        ({"softcap": 20.0}, "softcap; supported: none"),
        ({"sinks": torch.zeros(4)}, "sinks; supported: none"),
        ({"layout": PACKED}, "layout Packed; supported: Dense"),
        ({"layout": PAGED, "page_size": 16}, "layout Paged; supported: Dense"),
        ({"dtype": "float64"}, "dtype float64; supported: float16, bfloat16"),
        ({"kv_dtype": "float8_e4m3fn"}, "k and v in float8_e4m3fn; supported: q's dtype"),
        ({"batch": 20_000}, "batch x q_heads 80000; supported: up to 65535"),
    ],
)
def test_refuses_by_name(rung: ModuleType, changes: dict[str, Any], reason: str) -> None:
    (given,) = rung.refusals(problem(**changes))
    assert given.startswith(reason)


@pytest.mark.parametrize(
    ("name", "head_dim", "reason"),
    [
        ("cuda_fused_scalar", 192, "head_dim 192; supported: multiples of 8 up to 128"),
        ("cuda_fused_warp", 80, "head_dim 80; supported: multiples of 32 up to 256"),
        ("cuda_tensor_core", 256, "head_dim 256; supported: multiples of 16 up to 128"),
        ("cuda_split_kv", 72, "head_dim 72; supported: multiples of 16 up to 128"),
        ("cuda_dim_tiled", 2048, "head_dim 2048; supported: multiples of 64 up to 1024"),
    ],
)
def test_refuses_a_head_dim_it_has_no_registers_for(name: str, head_dim: int, reason: str) -> None:
    assert RUNGS[NAMES.index(name)].refusals(problem(head_dim=head_dim)) == [reason]


@pytest.mark.parametrize(
    ("name", "tile", "arch", "reason"),
    [
        ("cuda_split", {"edge": 64}, 90, "tile edge 64; supported: 8, 16, 32"),
        ("cuda_fused_scalar", {"q": 100}, 90, "tile q=100; supported: multiples of 32"),
        ("cuda_fused_scalar", {"k": 65}, 90, "tile k=65; supported: 1 to 64"),
        (
            "cuda_fused_scalar",
            {"q": 512},
            80,
            "its block takes 279040 B of shared memory; this GPU has 166912",
        ),
        ("cuda_fused_warp", {"q": 96}, 90, "tile q=96; supported: 64, 128"),
        (
            "cuda_fused_warp",
            {"q": 128, "k": 64},
            89,
            "its block takes 166912 B of shared memory; this GPU has 101376",
        ),
        ("cuda_tensor_core", {"q": 24}, 90, "tile q=24; supported: multiples of 16"),
        ("cuda_tensor_core", {"k": 256}, 90, "tile k=256; supported: multiples of 16 up to 128"),
        (
            "cuda_tensor_core",
            {"q": 1024},
            90,
            "its block takes 278528 B of shared memory; this GPU has 232448",
        ),
        ("cuda_split_kv", {"splits": 65}, 90, "tile splits=65; supported: 1 to 64"),
        ("cuda_dim_tiled", {"qk": 96}, 90, "tile qk=96; supported: multiples of 16 that divide head_dim"),
        ("cuda_dim_tiled", {"pv": 96}, 90, "tile pv=96; supported: multiples of 16 that divide head_dim"),
        (
            "cuda_dim_tiled",
            {"k": 128},
            90,
            "its block takes 52480 B of shared memory; supported: up to 49152",
        ),
    ],
)
def test_refuses_a_tile_the_device_cannot_hold(
    name: str, tile: dict[str, int], arch: int, reason: str
) -> None:
    rung = RUNGS[NAMES.index(name)]
    given = rung.refusals_for_tile(problem(head_dim=128, arch=arch), replace(rung.DEFAULT, **tile))
    assert given[0].startswith(reason)


def test_too_many_threads_are_refused() -> None:
    from strobe.attention.prefill import cuda_fused_scalar

    tile = cuda_fused_scalar.Tile(q=2048, k=1)
    given = cuda_fused_scalar.refusals_for_tile(problem(head_dim=8), tile)
    assert given == ["its block takes 2048 threads; supported: up to 1024"]


@pytest.mark.parametrize("head_dim", [64, 128, 192, 256, 320, 512, 1024])
def test_dim_tiled_takes_what_it_says_and_under_48_kib(head_dim: int) -> None:
    from strobe.attention.prefill import cuda_dim_tiled

    assert cuda_dim_tiled.refusals(problem(head_dim=head_dim)) == []
    defines = cuda_dim_tiled._defines("bfloat16", head_dim, cuda_dim_tiled.DEFAULT)
    taken = jit.compile(cuda_dim_tiled._SOURCE, defines, "sm_80").resources()["attend"]
    said = cuda_dim_tiled.footprint(head_dim, cuda_dim_tiled.DEFAULT).shared_bytes
    assert said - 1024 <= taken.static_shared <= said < 48 * 1024


def test_linear_rungs_refuse_by_name() -> None:
    def linear(tokens: int = 1, inputs: int = 64, **changes: Any) -> LinearProblem:
        return LinearProblem(
            tokens, inputs, 32, **{"dtype": "bfloat16", "device": "cuda", "arch": 90, **changes}
        )

    for rung in (cuda_gemv, cuda_matmul_naive, cuda_matmul_tiled):
        assert rung.refusals(linear()) == []
        assert rung.refusals(linear(device="cpu", arch=0)) == ["tensors on cpu; needs an NVIDIA GPU"]
        assert rung.refusals(linear(dtype="float64"))[0].startswith("dtype float64; supported: float16")
    assert cuda_gemv.refusals(linear(tokens=9)) == ["9 tokens; supported: up to 8"]
    assert cuda_gemv.refusals(linear(inputs=12)) == ["inputs 12; supported: multiples of 8"]
    assert cuda_matmul_naive.refusals(linear(tokens=600_000)) == ["600000 tokens; supported: up to 524280"]


def test_softmax_between_products_takes_any_layout_of_two_bytes_an_element() -> None:
    rung = importlib.import_module("strobe.attention.prefill.torch_cuda_softmax")
    for layout in ({}, {"layout": PACKED}, {"layout": PAGED, "page_size": 16}):
        assert rung.refusals(problem(window=(32, 0), return_lse=True, **layout)) == []
    assert rung.refusals(problem(device="cpu", arch=0)) == ["tensors on cpu; needs an NVIDIA GPU"]
    assert rung.refusals(problem(arch=75)) == ["compute capability 7.5; supported: 8.0 and up"]
    assert rung.refusals(problem(dtype="float32")) == ["dtype float32; supported: float16, bfloat16"]
    assert rung.refusals(problem(softcap=3.0, sinks=torch.zeros(4))) == [
        "softcap; supported: none",
        "sinks; supported: none",
    ]
