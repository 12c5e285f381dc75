"""How the projection by warpgroups is cut into blocks, what it refuses, and when "auto" takes it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strobe.linear import cuda_wgmma, ladder
from strobe.linear.problem import Append, LinearProblem

SM_BYTES, BLOCK_BYTES = 228 * 1024, 227 * 1024
HALF_SM = SM_BYTES // 2


def shape_of(problem: LinearProblem, sm_count: int = 132) -> cuda_wgmma.Shape:
    return cuda_wgmma.choose_shape(problem, sm_count, BLOCK_BYTES)


@given(
    tokens=st.integers(1, 64),
    inputs=st.integers(1, 4000).map(lambda pieces: 8 * pieces),
    columns=st.integers(1, 40_000).map(lambda quads: 4 * quads),
    norm=st.booleans(),
    swiglu=st.booleans(),
    sm_count=st.integers(1, 160),
)
def test_blocks_cover_the_columns_and_fit(
    tokens: int, inputs: int, columns: int, norm: bool, swiglu: bool, sm_count: int
) -> None:
    outputs = 2 * columns if swiglu else columns
    shape = shape_of(LinearProblem(tokens, inputs, outputs, "bfloat16", norm=norm, swiglu=swiglu), sm_count)
    clusters, rest = divmod(shape.blocks, shape.cluster)
    assert not rest
    assert (clusters - 1) * shape.each < columns <= clusters * shape.each
    assert not shape.each % 4
    assert tokens <= shape.tokens < tokens + 16
    part = -(-shape.each // 8) * 8
    rows = 2 * part if swiglu else part
    assert rows <= 128
    assert shape.x_stages >= 2 <= shape.stages
    rings = 128 * (shape.stages * max(rows, 64) + shape.x_stages * (shape.tokens + norm))
    sums = 4 * (rows + 4) * (2 * shape.tokens - shape.tokens // shape.cluster)
    assert max(rings, sums) + 16 * (shape.stages + shape.x_stages) <= shape.shared_bytes <= BLOCK_BYTES


@pytest.mark.parametrize("tokens", [17, 32, 64])
@pytest.mark.parametrize(
    ("outputs", "inputs", "around"),
    [
        (6144, 4096, {"norm": True}),  # Llama-3-8B's
        (4096, 4096, {"residual": True}),
        (28672, 4096, {"norm": True, "swiglu": True}),
        (4096, 14336, {"residual": True}),
        (12288, 4096, {"norm": True}),  # Llama-2-7B's
        (22016, 4096, {"norm": True, "swiglu": True}),
    ],
)
def test_blocks_run_all_at_once_and_alike_on_all_sms(
    outputs: int, inputs: int, around: dict[str, bool], tokens: int
) -> None:
    """One block on nearly every SM, and no two on one, or two."""
    shape = shape_of(LinearProblem(tokens, inputs, outputs, "bfloat16", **around))
    taken = shape.shared_bytes + 1024
    if 2 * taken > SM_BYTES:
        assert 126 <= shape.blocks <= 132
        assert taken <= HALF_SM + 1024  # what the other kind takes fits beside it
    else:
        assert 228 <= shape.blocks <= 264
        assert taken <= HALF_SM - 1024


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"arch": 80}, "needs a Hopper GPU"),
        ({"arch": 100}, "needs a Hopper GPU"),
        ({"device": "cpu", "arch": 0}, "needs a Hopper GPU"),
        ({"dtype": "float32"}, "dtype float32; supported: bfloat16, float16"),
        ({"tokens": 16}, "16 tokens; supported: 17 to 64"),
        ({"tokens": 8, "swiglu": True}, "8 tokens; supported: 9 to 64"),
        ({"tokens": 65}, "65 tokens; supported: 17 to 64"),
        ({"inputs": 4}, "inputs 4; supported: multiples of 8"),
        ({"outputs": 6}, "6 columns of the result; supported: multiples of 4"),
        ({"outputs": 12, "swiglu": True}, "6 columns of the result; supported: multiples of 4"),
        ({"append": Append(2, 1, 64, "float16")}, "fuses no append"),
    ],
)
def test_refuses_by_name(changed: dict[str, object], reason: str) -> None:
    fits: dict[str, object] = {"tokens": 17, "inputs": 8, "outputs": 256, "dtype": "float16"}
    fits |= {"device": "cuda", "arch": 90, "norm": True}
    assert not cuda_wgmma.refusals(LinearProblem(**fits))  # type: ignore[arg-type]
    (given,) = cuda_wgmma.refusals(LinearProblem(**(fits | changed)))  # type: ignore[arg-type]
    assert reason in given


HEADS = Append(2, 1, 64, "float16")


@pytest.mark.parametrize(
    ("changed", "rung", "fused"),
    [
        ({}, "cuda_wgmma", True),
        ({"append": HEADS}, "cuda_wgmma", False),
        ({"tokens": 16}, "cuda_skinny", True),
        ({"tokens": 16, "append": HEADS}, "cuda_skinny", True),
        ({"tokens": 16, "swiglu": True}, "cuda_wgmma", True),
        ({"tokens": 8, "swiglu": True}, "cuda_skinny", True),
        ({"tokens": 65}, "torch_linear", False),
        ({"arch": 80}, "torch_linear", False),
    ],
)
def test_auto_takes_it_between_few_tokens_and_many(
    changed: dict[str, object], rung: str, fused: bool
) -> None:
    wanted = LinearProblem(32, 64, 256, "float16", norm=True, device="cuda", arch=90)
    problem = replace(wanted, **changed)  # type: ignore[arg-type]
    chosen, run = ladder.choose(problem)
    assert (chosen.name, run == problem) == (rung, fused)
