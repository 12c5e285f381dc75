"""The CUDA rungs of the matrix product, and the small kernels beside them, against float64."""

from __future__ import annotations

import pytest
import torch
from projection_formula import around_a_product, formula

from strobe.errors import KernelRefusedError
from strobe.linear import Projection
from strobe.ops import activation, norm
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


def check_fused(kernel: str, tokens: int, inputs: int, columns: int, around: str, dtype: torch.dtype) -> None:
    """Against the formula; the first launch is an ordinary one, the others start ahead of their turn."""
    torch.manual_seed(tokens + inputs)
    wanted = {"biased": "bias" in around, "normed": "norm" in around, "swiglu": "swiglu" in around}
    projection = around_a_product(inputs, columns, dtype, **wanted, device="cuda")
    x = (2 * torch.randn(tokens, inputs, device="cuda")).to(dtype)
    residual = torch.randn(tokens, columns, device="cuda").to(dtype) if "residual" in around else None
    want = formula(x, projection, residual)
    given = [None if residual is None else residual.clone() for _ in range(3)]
    first, *more = [projection(x, each, kernel=kernel) for each in given]
    assert float((first.double() - want).abs().max()) <= EPSILON[dtype] * float(want.abs().max())
    assert all(torch.equal(first, other) for other in more)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 8, 16])
@pytest.mark.parametrize(
    ("inputs", "columns", "around"),
    [  # what stands around: bias, norm, swiglu, residual
        (8, 1, "norm"),
        (520, 7, "bias norm swiglu residual"),
        (1032, 1029, "bias swiglu"),
        (4096, 6144, "bias norm"),
        (4096, 4096, "residual"),
        (4096, 11008, "norm swiglu"),
        (14336, 4096, "residual"),
        (2048, 128256, "norm"),
    ],
)
def test_skinny(inputs: int, columns: int, around: str, tokens: int, dtype: torch.dtype) -> None:
    check_fused("cuda_skinny", tokens, inputs, columns, around, dtype)


def mlp_chain(dtype: torch.dtype, layers: int = 12) -> list[tuple[Projection, Projection]]:
    """Small projections, so that many of them are under way at a time."""
    return [
        (
            around_a_product(512, 1536, dtype, biased=False, normed=True, swiglu=True, device="cuda"),
            around_a_product(1536, 512, dtype, biased=False, normed=False, swiglu=False, device="cuda"),
        )
        for _ in range(layers)
    ]


@pytest.mark.parametrize("tokens", [17, 61])
@pytest.mark.parametrize(
    ("inputs", "columns", "around", "dtype"),
    [  # what stands around: bias, norm, swiglu, residual
        (8, 4, "norm", torch.float16),
        (520, 28, "bias norm swiglu residual", torch.float16),
        (1032, 1028, "bias swiglu", torch.bfloat16),
        (4096, 6144, "bias norm", torch.bfloat16),
        (2048, 2048, "residual", torch.float16),
        (4096, 11008, "norm swiglu", torch.bfloat16),
        (14336, 4096, "residual", torch.bfloat16),
        (2048, 128256, "norm", torch.bfloat16),
    ],
)
def test_wgmma(inputs: int, columns: int, around: str, dtype: torch.dtype, tokens: int) -> None:
    check_fused("cuda_wgmma", tokens, inputs, columns, around, dtype)


@pytest.mark.parametrize(
    ("kernel", "tokens"), [("cuda_skinny", 1), ("cuda_skinny", 8), ("cuda_skinny", 13), ("cuda_wgmma", 40)]
)
def test_a_chain_equals_its_steps(kernel: str, tokens: int) -> None:
    """Kernels that start before those ahead of them have ended read nothing too early."""
    torch.manual_seed(tokens)
    chain = mlp_chain(torch.bfloat16)
    x = torch.randn(tokens, 512, device="cuda").bfloat16()

    def run(wait: bool) -> torch.Tensor:
        state = x.clone()
        for gate_up, down in chain:
            raised = gate_up(state, kernel=kernel)
            if wait:
                torch.cuda.synchronize()
            down(raised, state, kernel=kernel)
            if wait:
                torch.cuda.synchronize()
        return state

    want = run(wait=True)
    assert all(torch.equal(run(wait=False), want) for _ in range(50))
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert torch.equal(run(wait=False), want)
        with torch.cuda.graph(graph, stream=stream):
            out = run(wait=False)
        for _ in range(50):
            graph.replay()
            assert torch.equal(out, want)


def test_skinny_refuses_by_name() -> None:
    x, weight = torch.ones(17, 12, device="cuda"), torch.ones(4, 12, device="cuda")
    with pytest.raises(KernelRefusedError, match=r"float32.*17 tokens; supported: up to 16; inputs 12"):
        Projection(weight)(x, kernel="cuda_skinny")


def test_wgmma_refuses_by_name() -> None:
    x, weight = torch.ones(65, 12, device="cuda"), torch.ones(6, 12, device="cuda")
    reasons = r"float32.*65 tokens; supported: 17 to 64; inputs 12; .*; 6 columns of the result"
    with pytest.raises(KernelRefusedError, match=reasons):
        Projection(weight)(x, kernel="cuda_wgmma")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [8, 1000, 4096, 16384])
@pytest.mark.parametrize("rows", [1, 65])
def test_norm_and_swiglu(rows: int, columns: int, dtype: torch.dtype) -> None:
    torch.manual_seed(columns)
    x, weight = (3 * torch.randn(rows, columns, device="cuda")).to(dtype), torch.randn(columns, device="cuda")
    gate_up = (3 * torch.randn(rows, 2 * columns, device="cuda")).to(dtype)
    weight = weight.to(dtype)
    pairs = [(activation.swiglu(gate_up, kernel="cuda"), activation.swiglu_reference(gate_up))]
    if columns * dtype.itemsize <= 32768:
        reference = norm.rms_norm_reference(x, weight, 1e-5)
        pairs.append((norm.rms_norm(x, weight, 1e-5, kernel="cuda"), reference))
    for out, want in pairs:
        limit = EPSILON[dtype] * float(want.double().abs().max())
        assert float((out.double() - want.double()).abs().max()) <= limit


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
