"""How the decode projection is cut into blocks, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strobe.attention.decode import cuda_cluster
from strobe.attention.problem import AttentionProblem, Paged
from strobe.linear import cuda_skinny, ladder
from strobe.linear.problem import Append, LinearProblem

SHARED_KIB = {80: 163, 89: 99, 90: 227, 120: 99}
SMS = 132


def shape_of(arch: int = 90, outputs: int = 28672, tokens: int = 1, **around: Any) -> cuda_skinny.Shape:
    problem = LinearProblem(tokens, 4096, outputs, "bfloat16", device="cuda", arch=arch, **around)
    return cuda_skinny.choose_shape(problem, SMS, SHARED_KIB[arch] * 1024)


@pytest.mark.parametrize("arch", SHARED_KIB)
@given(
    tokens=st.integers(1, 16),
    units=st.integers(1, 100_000),
    norm=st.booleans(),
    pairs=st.sampled_from([{}, {"swiglu": True}, {"append": Append(1, 1, 2, "bfloat16")}]),
)
def test_blocks_cover_the_outputs_and_fit(
    arch: int, tokens: int, units: int, norm: bool, pairs: dict[str, Any]
) -> None:
    shape = shape_of(arch, 2 * units if pairs else units, tokens, norm=norm, **pairs)
    assert (shape.blocks - 1) * shape.each < units <= shape.blocks * shape.each
    assert shape.each <= shape.tiles * (4 if pairs else 8)
    assert tokens <= shape.tokens
    assert shape.stages >= 2
    squares = 4 * 8 * shape.tokens  # beside the dynamic memory
    assert shape.shared_bytes + squares <= SHARED_KIB[arch] * 1024


@pytest.mark.parametrize("tokens", [1, 3, 8])
@pytest.mark.parametrize("outputs", [2048, 4096])
@pytest.mark.parametrize("arch", SHARED_KIB)
def test_a_kernel_of_either_kind_fits_beside_the_other(arch: int, outputs: int, tokens: int) -> None:
    """Of those that add to a residual an SM holds two blocks where few tokens have two for each; else one."""
    sm = (SHARED_KIB[arch] + 1) * 1024
    kept = 1024  # of each block
    onto = shape_of(arch, outputs, tokens, residual=True)
    normed = shape_of(arch, 28672, tokens, norm=True, swiglu=True).shared_bytes + kept + 4 * 8 * 8  # squares
    assert onto.shared_bytes + kept + normed <= sm
    assert (2 * (onto.shared_bytes + kept) <= sm) == (onto.blocks > SMS and tokens <= 4)


def test_one_block_an_sm_may_meet_another_where_its_ring_holds_all_of_its_weights() -> None:
    problem = LinearProblem(1, 2048, 2048, "bfloat16", residual=True, device="cuda", arch=90)
    shape = cuda_skinny.choose_shape(problem, SMS, 227 * 1024)
    assert shape.blocks <= SMS
    assert 2 * (shape.shared_bytes + 1024) <= 228 * 1024
    assert shape.stages * 8 * 64 >= problem.inputs


@pytest.mark.parametrize("tokens", [1, 8])
@pytest.mark.parametrize(("q_heads", "kv_heads", "head_dim"), [(32, 8, 128), (32, 32, 128), (32, 8, 64)])
def test_attention_by_clusters_fits_beside_the_projection_behind_it(
    tokens: int, q_heads: int, kv_heads: int, head_dim: int
) -> None:
    """Shared memory comes in pieces of 128 bytes."""
    layout = Paged(None, None, settled=True)
    row = AttentionProblem(
        *(1, 1, 1024, q_heads, kv_heads, head_dim), layout=layout, page_size=16, device="cuda", arch=90
    )
    attention = cuda_cluster.choose_shape(row)
    output = shape_of(90, 4096, tokens, residual=True)
    beside, onto = (
        -(-(each + 1024) // 128) * 128 for each in (attention.shared_bytes(), output.shared_bytes)
    )
    assert beside + onto <= 228 * 1024


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"arch": 75}, "needs an NVIDIA GPU with asynchronous copies"),
        ({"device": "cpu", "arch": 0}, "needs an NVIDIA GPU with asynchronous copies"),
        ({"dtype": "float32"}, "dtype float32; supported: bfloat16, float16"),
        ({"tokens": 17}, "17 tokens; supported: up to 16"),
        ({"inputs": 4}, "inputs 4; supported: multiples of 8"),
        ({"append": Append(4, 2, 64, "float16", head_norms=True)}, "norms of heads before they are rotated"),
        ({"append": Append(4, 2, 63, "float16")}, "head_dim 63; supported: even ones"),
        ({"append": Append(4, 2, 64, "bfloat16")}, "cache in bfloat16; supported: float16, float8_e4m3fn"),
        ({"append": Append(4, 2, 64, "float8_e4m3fn"), "arch": 80}, "needs compute capability 8.9"),
    ],
)
def test_refuses_by_name(changed: dict[str, object], reason: str) -> None:
    fits: dict[str, object] = {"tokens": 16, "inputs": 8, "outputs": 3, "dtype": "float16"}
    fits |= {"device": "cuda", "arch": 120, "norm": True, "residual": True}
    assert not cuda_skinny.refusals(LinearProblem(**fits))  # type: ignore[arg-type]
    (given,) = cuda_skinny.refusals(LinearProblem(**(fits | changed)))  # type: ignore[arg-type]
    assert reason in given


@pytest.mark.parametrize(
    ("changed", "rung", "fused"),
    [
        ({}, "cuda_skinny", True),
        ({"append": Append(2, 1, 64, "float16"), "outputs": 256}, "cuda_skinny", True),
        ({"append": Append(2, 1, 64, "float16", head_norms=True), "outputs": 256}, "cuda_skinny", False),
        ({"tokens": 17}, "torch_linear", False),
        ({"dtype": "float32"}, "torch_linear", False),
    ],
)
def test_auto_takes_it_for_few_tokens_of_16_bits(changed: dict[str, object], rung: str, fused: bool) -> None:
    wanted: dict[str, object] = {"tokens": 16, "inputs": 64, "outputs": 3, "dtype": "float16"}
    wanted |= {"device": "cuda", "arch": 90, "norm": True, "residual": True}
    problem = LinearProblem(**(wanted | changed))  # type: ignore[arg-type]
    chosen, run = ladder.choose(problem)
    assert (chosen.name, run == problem) == (rung, fused)
