"""cuda_async beyond what every rung is tested for: groups, pages, tiles, long strides, changing lengths."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from strobe.attention.api import empty_lse
from strobe.attention.cases import CORRECTNESS, Case, Inputs
from strobe.attention.check import verdict
from strobe.attention.inputs import describe
from strobe.attention.prefill import cuda_async
from strobe.attention.problem import Options, Packed, Paged

pytestmark = pytest.mark.gpu


def check(inputs: Inputs, **options: Any) -> None:
    problem = inputs.problem
    assert cuda_async.refusals(problem) == []
    out = torch.full_like(inputs.q, float("nan"), memory_format=torch.contiguous_format)
    lse = empty_lse(problem, inputs.q).fill_(float("nan"))
    cuda_async.run(problem, inputs.q, inputs.k, inputs.v, out, lse, **options)
    judged = verdict(problem, inputs.q, inputs.k, inputs.v, out, lse)
    assert judged.right, f"{problem}: {judged}"


FEATURES = ("odd_causal", "window_both", "sinks", "softcap_sinks_window", "packed_causal", "paged_packed")


@pytest.mark.parametrize("case", [case for case in CORRECTNESS if case.name in FEATURES], ids=str)
@pytest.mark.parametrize("group", [3, 5, 7, 71])
def test_any_group(case: Case, group: int) -> None:
    check(replace(case, q_heads=2 * group, kv_heads=2).inputs(torch.bfloat16, "cuda"))


@pytest.mark.parametrize("head_dim", range(32, 257, 16))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_head_dim_with_every_feature(head_dim: int, dtype: torch.dtype) -> None:
    case = Case("all", ((150, 333), (1, 90), (64, 10)), layout="paged_packed", sinks=True, softcap=20.0)
    check(replace(case, head_dim=head_dim, window=(70, 5)).inputs(dtype, "cuda"))


@pytest.mark.parametrize("page_size", [1, 3, 13, 16, 100, 256])
def test_any_page_size(page_size: int) -> None:
    rows = ((100, 300), (1, 50), (0, 20), (17, 1000))
    case = Case("pages", rows, layout="paged_packed", page_size=page_size, causal=True)
    check(case.inputs(torch.bfloat16, "cuda"))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_every_tile_of_the_table(head_dim: int) -> None:
    case = Case("tiles", ((300, 500),) * 2, head_dim=head_dim, causal=True)
    for tile in cuda_async.TILES[head_dim]:
        check(case.inputs(torch.bfloat16, "cuda"), tile=tile)


@pytest.mark.parametrize("step", [0.02, 0.5, 4.0, -0.5])
def test_a_maximum_that_keeps_rising(step: float) -> None:
    """Scores climb (or fall) by `step` a key: sums are rescaled seldom, in each tile, or never."""
    inputs = Case("ramp", ((70, 700),), q_heads=1, kv_heads=1).inputs(torch.bfloat16, "cuda")
    inputs.q[..., 0], inputs.k[..., 0] = 8.0, torch.arange(700, device="cuda")[:, None] * step
    inputs.k[..., 1:] *= 0.1
    check(inputs)


def test_nan_beside_a_row_stays_there() -> None:
    inputs = Case("", ((90, 110),) * 3, layout="packed").inputs(torch.bfloat16, "cuda")
    inputs.k[110:220], inputs.v[110:220] = float("nan"), float("nan")
    out = torch.empty_like(inputs.q)
    cuda_async.run(inputs.problem, inputs.q, inputs.k, inputs.v, out, None)
    assert out[90:180].isnan().all()
    assert not out[:90].isnan().any()
    assert not out[180:].isnan().any()


def test_nan_in_a_key_is_not_hidden() -> None:
    inputs = Case("", ((40, 100),)).inputs(torch.bfloat16, "cuda")
    inputs.k[0, 50] = float("nan")
    out = torch.empty_like(inputs.q)
    cuda_async.run(inputs.problem, inputs.q, inputs.k, inputs.v, out, None)
    assert out.isnan().all()


def test_offsets_past_two_to_the_31() -> None:
    plain = Case("far", ((60, 200),) * 2, head_dim=64).inputs(torch.bfloat16, "cuda")
    far = 2**31 + 64
    buffer = torch.empty(far + plain.k[0].numel(), dtype=torch.bfloat16, device="cuda")
    k = buffer.as_strided(plain.k.shape, (far, *plain.k.stride()[1:]))
    k.copy_(plain.k)
    check(Inputs(plain.q, k, plain.v, plain.options))


def test_a_graph_reads_lengths_on_the_device() -> None:
    """Captured once at the largest lengths, replayed at others, as the engine does."""
    rows = ((60, 200), (1, 300), (100, 100))
    inputs = Case("graph", rows, layout="paged_packed", causal=True).inputs(torch.bfloat16, "cuda")
    inputs.k.nan_to_num_(), inputs.v.nan_to_num_()
    problem, out = inputs.problem, torch.empty_like(inputs.q)
    cuda_async.run(problem, inputs.q, inputs.k, inputs.v, out, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cuda_async.run(problem, inputs.q, inputs.k, inputs.v, out, None)
    layout = inputs.options["layout"]
    assert isinstance(layout, Paged)
    layout.seq_lens.copy_(torch.tensor([33, 299, 90]))
    layout.cu_seqlens_q.copy_(torch.tensor([0, 10, 11, 91]))
    out.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    fresh = Paged(layout.page_table, layout.seq_lens.clone(), layout.cu_seqlens_q.clone())
    q = inputs.q[:91]
    judged = verdict(
        describe(q, inputs.k, inputs.v, Options(causal=True, layout=fresh)), q, inputs.k, inputs.v, out[:91]
    )
    assert judged.right, str(judged)


def test_empty_rows_only() -> None:
    layout = Packed(*(torch.zeros(4, dtype=torch.int32, device="cuda") for _ in range(2)), 0, 0)
    q = k = torch.empty(0, 2, 64, dtype=torch.bfloat16, device="cuda")
    from strobe.attention import attention

    assert attention(q, k, k, layout=layout, kernel="cuda_async").shape == q.shape
