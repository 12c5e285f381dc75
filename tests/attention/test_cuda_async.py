"""cuda_async without a GPU: its choice of tiles, its refusals, no spills with every feature on.

tests/gpu runs it; tests/cuda compiles its plain forms for every arch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from strobe.attention import dense
from strobe.attention.prefill import cuda_async
from strobe.attention.problem import AttentionProblem
from strobe.cuda import jit

PLAIN = AttentionProblem(2, 64, 64, 4, 2, 64, dtype="bfloat16", device="cuda", arch=90)


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("head_dim", range(32, 257, 16))
def test_every_head_dim_has_a_tile_that_fits(arch: int, head_dim: int) -> None:
    problem = replace(PLAIN, head_dim=head_dim, arch=arch, scale=None)
    tile = cuda_async.choose_tile(head_dim, arch)
    assert cuda_async.refusals(problem) == []
    assert cuda_async.refusals_for_tile(problem, tile) == []
    # an SM has 1 KiB more than a block may take, and keeps 1 KiB for each block
    together = tile.blocks_per_sm * (tile.shared_bytes(head_dim) + 1024)
    assert together <= dense.shared_memory(arch) + 1024


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("head_dim", [48, 64, 80, 96, 112, 128, 192, 256])
def test_no_feature_spills(arch: str, head_dim: int) -> None:
    problem = replace(PLAIN, head_dim=head_dim, window=(64, 32), softcap=30.0, sinks=(0.0,) * 4)
    tile = cuda_async.choose_tile(head_dim, int(arch[3:5]))
    cubin = jit.compile(cuda_async._SOURCE, cuda_async.defines(problem, tile), arch)
    assert cubin.resources()["attend"].spills == 0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"head_dim": 72}, "head_dim 72"),
        ({"head_dim": 512}, "head_dim 512"),
        ({"dtype": "float32"}, "float32"),
        ({"kv_dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
        ({"scale": 0.0}, "scale 0.0"),
        ({"scale": -1.0}, "scale -1.0"),
        ({"arch": 75}, "compute capability 7.5; supported: 8.0 and up"),
        ({"device": "cpu", "arch": 0}, "tensors on cpu; needs an NVIDIA GPU"),
    ],
)
def test_refuses_by_name(change: dict[str, Any], named: str) -> None:
    reasons = cuda_async.refusals(replace(PLAIN, **change))
    assert len(reasons) == 1
    assert named in reasons[0]


@pytest.mark.parametrize(
    ("tile", "named"),
    [
        (cuda_async.Tile(q=72), "tile q=72"),
        (cuda_async.Tile(k=40), "tile k=40"),
        (cuda_async.Tile(q=0), "tile q=0"),
        (cuda_async.Tile(q=512, k=64, warps=4), "registers"),
        (cuda_async.Tile(q=128, k=1024, warps=8), "registers"),
        (cuda_async.Tile(stages=1), "stages=1"),
        (cuda_async.Tile(q_in_registers=2), "q_in_registers=2; supported: 0, 1"),
        (cuda_async.Tile(blocks_per_sm=0), "blocks_per_sm=0; supported: 1 to 4 of this size"),
        (cuda_async.Tile(blocks_per_sm=5), "blocks_per_sm=5; supported: 1 to 4 of this size"),
        (cuda_async.Tile(q=128, k=128, warps=8, stages=8), "shared memory"),
        (cuda_async.Tile(q=1024, k=16, warps=64), "2048 threads"),
    ],
)
def test_refuses_a_tile_by_name(tile: cuda_async.Tile, named: str) -> None:
    reasons = cuda_async.refusals_for_tile(PLAIN, tile)
    assert any(named in reason for reason in reasons)


def test_without_a_gpu_no_block_is_too_large_for_it() -> None:
    reasons = cuda_async.refusals_for_tile(replace(PLAIN, device="cpu", arch=0), cuda_async.Tile(k=128))
    assert reasons == []
