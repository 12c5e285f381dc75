"""strobe.attention under torch.compile on a GPU: one operator, captured in CUDA graphs, on any stream."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import strobe
from strobe.attention import ladder
from strobe.attention.cases import Case, Inputs

pytestmark = pytest.mark.gpu


def inputs_of(layout: str) -> Inputs:
    rows = {"dense": ((70, 130),) * 2, "packed": ((70, 130), (33, 40)), "paged": ((1, 130), (1, 40))}
    rows["one query"] = ((1, 700),) * 2
    memory = "dense" if layout == "one query" else layout
    return Case("compiled", rows[layout], 4, 2, 128, layout=memory, causal=True).inputs(
        torch.bfloat16, "cuda"
    )


@pytest.mark.parametrize(
    ("layout", "backend"),
    [
        ("dense", "cudagraphs"),  # the first call of all: what lasts is made within it
        ("dense", "aot_eager"),
        ("one query", "cudagraphs"),
        ("one query", "aot_eager"),
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


@pytest.mark.parametrize("traced", [False, True])
def test_gradients_are_the_formula_s(traced: bool) -> None:
    """Also where the plan of a call that wanted none is there already."""
    inputs, sinks = inputs_of("dense"), torch.randn(4, device="cuda")

    def loss(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor, kernel: str
    ) -> torch.Tensor:
        out = strobe.attention(q, k, v, causal=True, sinks=sinks, kernel=kernel)
        return out.float().square().sum()

    for wanted in ((True, True, True, True), (False, False, False, True)):
        gradients = []
        call = torch.compile(loss, backend="aot_eager", fullgraph=True) if traced else loss
        for each, kernel in ((loss, "torch_naive"), (call, "auto")):
            given = [x.clone() for x in (inputs.q, inputs.k, inputs.v, sinks)]
            each(*given, kernel)
            for x, wants in zip(given, wanted, strict=True):
                x.requires_grad_(wants)
            each(*given, kernel).backward()
            gradients.append([x.grad.float() for x in given if x.grad is not None])
        assert len(gradients[0]) == sum(wanted)
        for ours, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, expected, atol=2e-2 * float(expected.abs().max()), rtol=0)


def test_vmap_and_fake_tensors_of_a_gpu() -> None:
    inputs = inputs_of("dense")
    q, k, v = (x.unflatten(0, (2, 1)) for x in (inputs.q, inputs.k, inputs.v))
    expected = strobe.attention(inputs.q, inputs.k, inputs.v, causal=True)
    given = torch.vmap(lambda q, k, v: strobe.attention(q, k, v, causal=True))(q, k, v)
    torch.testing.assert_close(given[:, 0], expected, atol=1e-2, rtol=1e-2)
    with FakeTensorMode() as mode:
        out = strobe.attention(*(mode.from_tensor(x) for x in (inputs.q, inputs.k, inputs.v)), causal=True)
    assert (out.shape, out.dtype, out.device) == (expected.shape, expected.dtype, expected.device)
