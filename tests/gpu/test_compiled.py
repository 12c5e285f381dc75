"""strobe.attention under torch.compile on a GPU: one operator, captured in CUDA graphs, on any stream."""

from __future__ import annotations

import pytest
import torch

import strobe
from strobe.attention import ladder
from strobe.attention.cases import Case, Inputs

pytestmark = pytest.mark.gpu


def inputs_of(layout: str) -> Inputs:
    rows = {"dense": ((70, 130),) * 2, "packed": ((70, 130), (33, 40)), "paged": ((1, 130), (1, 40))}[layout]
    return Case("compiled", rows, 4, 2, 128, layout=layout, causal=True).inputs(torch.bfloat16, "cuda")


@pytest.mark.parametrize(
    ("layout", "backend"),
    [
        ("dense", "aot_eager"),
        ("dense", "cudagraphs"),
        ("packed", "aot_eager"),
        ("packed", "cudagraphs"),
        ("paged", "aot_eager"),
    ],
)
def test_traced_calls_give_the_eager_bits(layout: str, backend: str) -> None:
    inputs = inputs_of(layout)
    assert "cuda_" in ladder.choose(inputs.problem).name

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = strobe.attention(q + 1, k, v, **inputs.options, return_lse=True)
        return 2 * out, lse

    compiled = torch.compile(call, backend=backend, fullgraph=True)
    k, v = inputs.k.nan_to_num(), inputs.v.nan_to_num()
    with torch.no_grad():
        for _ in range(4):  # warm-up, capture, replays with other queries
            q = torch.randn_like(inputs.q)
            given = [x.clone() for x in compiled(q, k, v)]
            for ours, eager in zip(given, call(q, k, v), strict=True):
                assert torch.equal(ours, eager)


def test_a_traced_call_follows_the_current_stream() -> None:
    inputs = inputs_of("dense")
    compiled = torch.compile(
        lambda q: strobe.attention(q, inputs.k, inputs.v, causal=True), backend="aot_eager", fullgraph=True
    )
    q = inputs.q.clone()
    with torch.no_grad():
        expected = compiled(2 * q)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            q.mul_(2)
            out = compiled(q)
    stream.synchronize()
    assert torch.equal(out, expected)


def test_gradients_of_a_traced_call_are_the_formula_s() -> None:
    inputs = inputs_of("dense")

    def loss(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kernel: str) -> torch.Tensor:
        return strobe.attention(q, k, v, causal=True, kernel=kernel).float().square().sum()

    gradients = []
    for call, kernel in (
        (loss, "torch_naive"),
        (torch.compile(loss, backend="aot_eager", fullgraph=True), "auto"),
    ):
        given = [x.clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
        call(*given, kernel).backward()
        gradients.append([x.grad.float() for x in given])
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, atol=2e-2 * float(expected.abs().max()), rtol=0)
