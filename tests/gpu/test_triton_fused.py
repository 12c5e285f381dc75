"""triton_fused compiled: each configuration it may choose, what is kept of them, and rows beside rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from strobe.attention import triton_launch, triton_tuned
from strobe.attention.cases import Case, Inputs
from strobe.attention.check import verdict
from strobe.attention.prefill import triton_fused
from strobe.attention.triton_tuned import Config

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _kept_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STROBE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton_tuned, "_chosen", {})
    monkeypatch.setattr(triton_launch, "_loaded", {})


def ragged(head_dim: int) -> Inputs:
    rows = ((130, 130), (1, 200), (0, 9), (300, 300), (64, 3))
    return Case("", rows, head_dim=head_dim, layout="packed", causal=True).inputs(torch.bfloat16, "cuda")


def judge(inputs: Inputs) -> torch.Tensor:
    out = torch.full_like(inputs.q, float("nan"))
    triton_fused.run(inputs.problem, inputs.q, inputs.k, inputs.v, out, None)
    judged = verdict(inputs.problem, inputs.q, inputs.k, inputs.v, out)
    assert judged.right, str(judged)
    return out


@pytest.mark.parametrize("config", sorted({*triton_fused.HOPPER, *triton_fused.OTHERS}), ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_every_configuration(config: Config, head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_fused, "fitting", lambda head_dim, device: [config])
    judge(ragged(head_dim))


def test_the_next_process_neither_compiles_nor_times(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = ragged(64)
    first = judge(inputs)
    triton_tuned._chosen.clear()
    triton_launch._loaded.clear()  # as in a new process
    monkeypatch.setattr(triton_launch, "build", lambda *_: pytest.fail("compiled again"))
    monkeypatch.setattr(triton_tuned, "measure", lambda *_: pytest.fail("timed again"))
    assert torch.equal(judge(inputs), first)


def test_a_first_call_that_is_captured_runs_the_first_configuration() -> None:
    inputs = ragged(64)
    out, graph = torch.full_like(inputs.q, float("nan")), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        triton_fused.run(inputs.problem, inputs.q, inputs.k, inputs.v, out, None)
    graph.replay()
    assert verdict(inputs.problem, inputs.q, inputs.k, inputs.v, out).right
    assert triton_tuned._chosen == {}


@pytest.mark.parametrize("moved", [1, 8], ids=["2 bytes", "16 bytes"])
def test_inputs_and_outputs_that_no_vector_access_takes(moved: int) -> None:
    inputs = Case("", ((70, 90),) * 2, 3, 3, head_dim=64, causal=True).inputs(torch.bfloat16, "cuda")
    q, k, v, out = (
        torch.full((x.numel() + moved,), float("nan"), dtype=x.dtype, device="cuda")[moved:]
        .view(x.shape)
        .copy_(x)
        for x in (inputs.q, inputs.k, inputs.v, torch.full_like(inputs.q, float("nan")))
    )
    triton_fused.run(inputs.problem, q, k, v, out, None)
    assert verdict(inputs.problem, q, k, v, out).right


def test_nan_beside_a_row_stays_there() -> None:
    inputs = Case("", ((90, 110),) * 3, layout="packed").inputs(torch.bfloat16, "cuda")
    inputs.k[110:220], inputs.v[110:220] = float("nan"), float("nan")
    out = torch.empty_like(inputs.q)
    triton_fused.run(inputs.problem, inputs.q, inputs.k, inputs.v, out, None)
    assert out[90:180].isnan().all()
    assert not out[:90].isnan().any()
    assert not out[180:].isnan().any()
