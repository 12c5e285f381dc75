"""torch.compile and torch.export see one operator: no graph break, the same numbers."""

from __future__ import annotations

import gc

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import strobe
from strobe.attention import Packed, Paged
from strobe.attention.api import attention
from strobe.attention.cases import Case
from strobe.attention.multihead import MultiHeadAttention


@pytest.mark.parametrize("layout", ["dense", "packed", "paged", "paged_packed"])
def test_compiles_without_a_graph_break(layout: str) -> None:
    rows = ((4, 20), (4, 9)) if layout.startswith("pa") else ((4, 20),) * 2
    inputs = Case("x", rows, layout=layout, causal=True, sinks=True).inputs(torch.float32)

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = strobe.attention(q, k, v, **inputs.options, return_lse=True)
        return out * 2, lse

    compiled = torch.compile(call, backend="eager", fullgraph=True)
    for given, expected in zip(
        compiled(inputs.q, inputs.k, inputs.v), call(inputs.q, inputs.k, inputs.v), strict=True
    ):
        torch.testing.assert_close(given, expected)


def test_the_operator_is_registered_soundly() -> None:
    q, k, v = torch.randn(3, 2, 6, 2, 16)
    nothing = [None] * 8
    for return_lse in (False, True):
        torch.library.opcheck(
            torch.ops.strobe.attention.default,
            (q, k, v, *nothing, [-1, -1], True, None, 0.0, "auto", return_lse),
            test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
        )


@pytest.mark.parametrize("layout", ["dense", "packed", "paged"])
def test_gradients_are_those_of_an_eager_call(layout: str) -> None:
    rows = {"dense": ((4, 20), (4, 20)), "packed": ((4, 20), (3, 9)), "paged": ((4, 20), (4, 9))}[layout]
    inputs = Case("x", rows, layout=layout, causal=True, sinks=True).inputs(torch.float32)

    def loss(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
        options = {**inputs.options, "sinks": sinks, "kernel": "prefill/torch_naive"}
        out, lse = strobe.attention(q * 2, k, v, **options, return_lse=True)
        return out.square().sum() + lse.cos().sum()

    gradients = []
    for call in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        given = [x.clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v, inputs.options["sinks"])]
        call(*given).backward()
        gradients.append([x.grad for x in given])
    torch.testing.assert_close(gradients[1], gradients[0])


class Model(torch.nn.Module):
    """A model that calls the public function."""

    def __init__(self) -> None:
        super().__init__()
        self.project = torch.nn.Linear(32, 96)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, 4, 8)).unbind(2)
        return strobe.attention(q, k, v, causal=True).flatten(-2)


def test_export_of_a_model_for_any_length() -> None:
    model = Model().eval()
    lengths = {"x": {1: torch.export.Dim("tokens", min=2, max=64)}}
    exported = torch.export.export(model, (torch.randn(2, 7, 32),), dynamic_shapes=lengths)
    assert any("strobe.attention" in str(node.target) for node in exported.graph.nodes)
    for tokens in (7, 19):
        x = torch.randn(2, tokens, 32)
        torch.testing.assert_close(exported.module()(x), model(x))


def test_export_of_the_module() -> None:
    module = MultiHeadAttention(32, 4).eval()
    x = torch.randn(2, 7, 32)
    with torch.no_grad():
        exported = torch.export.export(module, (x,), {"causal": True})
        torch.testing.assert_close(exported.module()(x, causal=True), module(x, causal=True))
    assert any("strobe.attention" in str(node.target) for node in exported.graph.nodes)


@pytest.mark.parametrize("layout", ["packed", "paged"])
def test_a_traced_call_leaves_nothing_to_the_collector(layout: str) -> None:
    """On a GPU such remains hold memory."""
    inputs = Case("x", ((4, 20), (4, 9)), layout=layout).inputs(torch.float32)
    compiled = torch.compile(
        lambda q: strobe.attention(q, inputs.k, inputs.v, **inputs.options), backend="eager", fullgraph=True
    )
    compiled(inputs.q)

    def layouts() -> int:
        return sum(type(each) in (Packed, Paged) for each in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        before = layouts()
        for _ in range(3):
            compiled(inputs.q)
        assert layouts() == before
    finally:
        gc.enable()


@pytest.mark.parametrize("wanted", ["q", "k", "v"])
def test_gradients_flow_through_every_kernel(wanted: str) -> None:
    """Also where an earlier call wanted none, and found its plan."""
    tensors = dict(zip("qkv", torch.randn(3, 2, 7, 4, 16), strict=True))
    attention(**tensors, causal=True, kernel="textbook")
    leaf = tensors[wanted].requires_grad_()
    for _ in range(2):
        gradients = []
        for kernel in ("textbook", "torch_naive"):
            out = attention(**tensors, causal=True, kernel=kernel)
            gradients += torch.autograd.grad((out * torch.arange(16)).sum(), leaf)
        torch.testing.assert_close(gradients[0], gradients[1], atol=1e-4, rtol=1e-4)
        with torch.no_grad():
            assert not attention(**tensors, causal=True, kernel="textbook").requires_grad


def test_fake_tensors_of_a_gpu_that_is_not_there() -> None:
    with FakeTensorMode():
        heads = (torch.empty(2, n, 9, 64, dtype=torch.bfloat16, device="cuda") for n in (8, 2, 2))
        q, k, v = (x.transpose(1, 2) for x in heads)
        out, lse = strobe.attention(q, k, v, return_lse=True)
    assert out.shape == q.shape
    assert out.is_contiguous()
    assert lse.shape == (2, 8, 9)
    assert (out.device.type, lse.dtype) == ("cuda", torch.float32)


def test_a_dispatch_mode_sees_the_operator() -> None:
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    q, k, v = torch.randn(3, 2, 7, 4, 16)
    expected = attention(q, k, v)
    with Watch():
        given = attention(q, k, v)
    assert "strobe.attention.default" in seen
    torch.testing.assert_close(given, expected)


@pytest.mark.parametrize("kernel", ["torch_naive", "textbook"])
def test_vmap_is_a_loop_over_calls(kernel: str) -> None:
    q, k, v = torch.randn(3, 5, 2, 7, 4, 16)
    each = torch.stack([attention(*one, causal=True, kernel=kernel) for one in zip(q, k, v, strict=True)])
    given = torch.vmap(lambda q, k, v: attention(q, k, v, causal=True, kernel=kernel))(q, k, v)
    torch.testing.assert_close(given, each)


def test_packed_lengths_may_be_left_out() -> None:
    sums = torch.tensor([0, 3, 8], dtype=torch.int32)
    q, k, v = torch.randn(3, 8, 2, 16)
    given = attention(q, k, v, layout=Packed(sums, sums, 5, 5))
    torch.testing.assert_close(attention(q, k, v, layout=Packed(sums, sums)), given)
