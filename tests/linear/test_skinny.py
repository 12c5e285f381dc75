"""The decode projection's shared memory, and what it refuses."""

from __future__ import annotations

import pytest

from strobe.linear import cuda_skinny
from strobe.linear.problem import LinearProblem

SHARED_KIB = {90: 227, 100: 227, 120: 99}


@pytest.mark.parametrize("arch", SHARED_KIB)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("tokens", range(1, 9))
def test_two_kernels_blocks_fit_an_sm(arch: int, norm: bool, tokens: int) -> None:
    most = SHARED_KIB[arch] * 1024
    stages, slots, dynamic = cuda_skinny.Shape().rings(tokens, norm, most)
    assert stages >= 3
    assert slots >= 2
    block = dynamic + 512 + 1024  # its barriers, and what the SM keeps for each block
    assert block <= most + 1024
    if most >= 227 * 1024:
        assert 2 * block <= most + 1024


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"arch": 80}, "needs an NVIDIA GPU with bulk copies"),
        ({"device": "cpu", "arch": 0}, "needs an NVIDIA GPU with bulk copies"),
        ({"dtype": "float32"}, "dtype float32; supported: bfloat16, float16"),
        ({"tokens": 9}, "9 tokens; supported: up to 8"),
        ({"inputs": 4}, "inputs 4; supported: multiples of 8"),
    ],
)
def test_refuses_by_name(changed: dict[str, object], reason: str) -> None:
    fits: dict[str, object] = {"tokens": 8, "inputs": 8, "outputs": 3, "dtype": "float16"}
    fits |= {"device": "cuda", "arch": 120, "norm": True, "residual": True}
    assert not cuda_skinny.refusals(LinearProblem(**fits))  # type: ignore[arg-type]
    (given,) = cuda_skinny.refusals(LinearProblem(**(fits | changed)))  # type: ignore[arg-type]
    assert reason in given
