"""The CUDA rungs of the matrix product, and softmax alone, against float64."""

from __future__ import annotations

import pytest
import torch

from strobe.errors import KernelRefusedError
from strobe.linear import Projection
from strobe.ops.softmax import softmax

pytestmark = pytest.mark.gpu

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
EPSILON = {torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float32: 2**-20}


def check(kernel: str, tokens: int, inputs: int, outputs: int, dtype: torch.dtype, biased: bool) -> None:
    rng = torch.Generator("cuda").manual_seed(tokens * 1_000_003 + inputs * 1009 + outputs)
    x = torch.randn(tokens, inputs, device="cuda", generator=rng).to(dtype)
    weight = (torch.randn(outputs, inputs, device="cuda", generator=rng) * inputs**-0.5).to(dtype)
    bias = torch.randn(outputs, device="cuda", generator=rng).to(dtype) if biased else None
    want = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    torch.full((tokens, outputs), float("nan"), dtype=dtype, device="cuda")  # where out is likely to be
    out = Projection(weight, bias)(x, kernel=kernel)
    assert out.dtype == dtype
    assert float((out.double() - want).abs().max()) <= EPSILON[dtype] * float(want.abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", ["cuda_matmul_naive", "cuda_matmul_tiled"])
@pytest.mark.parametrize(
    ("tokens", "inputs", "outputs"), [(1, 1, 1), (3, 17, 5), (64, 64, 64), (65, 127, 129), (200, 512, 300)]
)
def test_matmul(kernel: str, tokens: int, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    check(kernel, tokens, inputs, outputs, dtype, biased=outputs % 2 == 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 5, 8])
@pytest.mark.parametrize(("inputs", "outputs"), [(8, 1), (64, 7), (1000, 129), (4096, 14336), (11008, 512)])
def test_gemv(tokens: int, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    check("cuda_gemv", tokens, inputs, outputs, dtype, biased=outputs % 2 == 1)


def test_gemv_refuses_by_name() -> None:
    x, weight = torch.ones(9, 12, device="cuda"), torch.ones(4, 12, device="cuda")
    with pytest.raises(KernelRefusedError, match="9 tokens; supported: up to 8; inputs 12"):
        Projection(weight)(x, kernel="cuda_gemv")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 31, 256, 1000, 50_257])
def test_softmax(columns: int, dtype: torch.dtype) -> None:
    x = (5 * torch.randn(7, 3, columns, device="cuda")).to(dtype)
    x[2, 1] = float("-inf")
    x[3, 0, : columns // 2] = float("-inf")
    want = torch.softmax(x.double(), -1).nan_to_num(0.0)
    out = softmax(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), want, rtol=2 * EPSILON[dtype], atol=1e-7)
    assert (out[2, 1] == 0).all()
