"""The decode ladder on a GPU: the case table, random caches, graphs, repeats, streams, float8.

Outputs are poisoned with NaN, and so is every slot of the cache that holds no key of a row.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from strobe.attention import ladder
from strobe.attention.api import empty_lse
from strobe.attention.cases import CORRECTNESS, Case, Inputs
from strobe.attention.check import verdict
from strobe.attention.decode import cuda_paged
from strobe.attention.inputs import describe
from strobe.attention.ladder import Rung
from strobe.attention.problem import UNLIMITED, Options, Paged

pytestmark = pytest.mark.gpu

RUNGS = [rung for rung in ladder.DECODE if rung.name.startswith(("cuda_", "triton_"))]
PAGED = [case for case in CORRECTNESS if case.layout.startswith("paged")]
FP8 = torch.float8_e4m3fn


def run(rung: Rung, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    problem = inputs.problem
    out = torch.full_like(inputs.q, float("nan"), memory_format=torch.contiguous_format)
    lse = empty_lse(problem, inputs.q).fill_(float("nan"))
    rung.run(problem, inputs.q, inputs.k, inputs.v, out, lse)
    return out, lse


def wrong(rung: Rung, inputs: Inputs) -> str | None:
    judged = verdict(inputs.problem, inputs.q, inputs.k, inputs.v, *run(rung, inputs))
    return None if judged.right else str(judged)


def needs_paged() -> Rung:
    rung = ladder.find("decode/cuda_paged", "decode")
    if reasons := rung.refusals(random_case(0).inputs(torch.bfloat16, "cuda").problem):
        pytest.skip(f"{rung} refuses: {'; '.join(reasons)}")
    return rung


@pytest.mark.parametrize("rung", RUNGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_case_table(rung: Rung, dtype: torch.dtype, head_dim: int) -> None:
    ran, failures, reasons = 0, [], set()
    for case in PAGED:
        inputs = replace(case, head_dim=head_dim).inputs(dtype, "cuda")
        if refused := rung.refusals(inputs.problem):
            reasons.update(refused)
            continue
        ran += 1
        if failure := wrong(rung, inputs):
            failures.append(f"{case}: {failure}")
    assert not failures, "\n".join(failures)
    if not ran:
        pytest.skip(f"{rung} refuses: {'; '.join(sorted(reasons)[:3])}")


def random_case(seed: int) -> Case:
    """Lengths around page borders, any page size, group, chunk, window, softcap and sinks."""
    draw = random.Random(seed)
    page_size = draw.choice([1, 2, 5, 16, 16, 48, 64, 100, 256])
    kv_heads = draw.choice([1, 2, 4])
    packed = draw.random() < 0.3
    q_len = draw.choice([1, 1, 1, 2, 4, 7, 16])
    lens = [0, 1, page_size - 1, page_size, page_size + 1, draw.randint(1, 3000), draw.randint(1, 300)]
    rows = tuple(
        (draw.randint(0 if i else 1, q_len) if packed else q_len, n)
        for i, n in enumerate(draw.sample(lens, draw.randint(1, 7)))
    )
    return Case(
        f"random_{seed}",
        rows,
        q_heads=kv_heads * draw.choice([1, 2, 3, 4, 8, 16]),
        kv_heads=kv_heads,
        head_dim=draw.choice(cuda_paged.HEAD_DIMS),
        layout="paged_packed" if packed else "paged",
        page_size=page_size,
        causal=draw.random() < 0.8,
        window=(draw.choice([UNLIMITED, UNLIMITED, 0, 40]), draw.choice([UNLIMITED, 0, 3])),
        softcap=draw.choice([0.0, 0.0, 15.0]),
        sinks=draw.random() < 0.3,
        values=draw.choice(["normal", "normal", "large", "equal"]),
    )


@pytest.mark.parametrize("seed", range(40))
def test_random_caches(seed: int) -> None:
    rung, case = needs_paged(), random_case(seed)
    failure = wrong(rung, case.inputs(random.Random(seed).choice([torch.bfloat16, torch.float16]), "cuda"))
    assert failure is None, f"{case!r}: {failure}"


@pytest.mark.parametrize(
    ("batch", "kv_len", "q_heads", "kv_heads", "head_dim"),
    [(1, 70_000, 32, 8, 128), (3, 9_001, 8, 8, 64), (1, 20_000, 16, 1, 128), (70, 1_500, 16, 4, 128)],
)
def test_long_rows_are_split_and_merged(
    batch: int, kv_len: int, q_heads: int, kv_heads: int, head_dim: int
) -> None:
    rows = tuple((1, max(1, kv_len - 137 * i)) for i in range(batch))
    inputs = Case("long", rows, q_heads, kv_heads, head_dim, "paged", causal=True).inputs(
        torch.bfloat16, "cuda"
    )
    assert wrong(needs_paged(), inputs) is None


def test_one_long_row_among_short_ones() -> None:
    draw = random.Random(7)
    rows = ((1, 40_000), *((1, draw.randint(0, 900)) for _ in range(90)))
    inputs = Case("mixed", rows, 8, 2, 128, "paged", causal=True).inputs(torch.bfloat16, "cuda")
    assert wrong(needs_paged(), inputs) is None


def test_rows_may_share_pages() -> None:
    """A common prefix, as a prefix cache gives it."""
    inputs = Case("shared", ((1, 500), (1, 700), (1, 333)), 8, 2, 128, "paged", causal=True).inputs(
        torch.bfloat16, "cuda"
    )
    inputs.options["layout"].page_table[:, :10] = inputs.options["layout"].page_table[1, :10].clone()
    assert wrong(needs_paged(), inputs) is None


def test_layers_of_one_cache_and_strided_queries() -> None:
    """k and v as one layer's slice of a larger cache, q as a slice of a fused projection."""
    inputs = Case("", ((1, 300), (1, 45)), 8, 2, 128, "paged", causal=True).inputs(torch.bfloat16, "cuda")
    pages = torch.randn(5, inputs.k.shape[0], 2, *inputs.k.shape[1:], device="cuda").bfloat16()
    q = torch.randn(2, 1, 12, 128, device="cuda").bfloat16()[:, :, 2:10]
    assert wrong(needs_paged(), Inputs(q, pages[3, :, 0], pages[3, :, 1], inputs.options)) is None


@pytest.mark.parametrize(
    "case", [random_case(3), random_case(5), Case("b1", ((1, 8192),), 32, 8, 128, "paged")], ids=str
)
def test_twenty_repeats_give_the_same_bits(case: Case) -> None:
    rung, inputs = needs_paged(), case.inputs(torch.bfloat16, "cuda")
    first_out, first_lse = run(rung, inputs)
    for _ in range(20):
        out, lse = run(rung, inputs)
        assert torch.equal(out, first_out)
        assert torch.equal(lse, first_lse)


def test_graphs_replay_with_other_lengths_and_tables() -> None:
    """Two graphs over one layout, each replayed first in its turn."""
    rung = needs_paged()
    drawn = Case("graph", tuple((1, n) for n in (900, 3000, 17, 1)), 8, 2, 128, "paged", causal=True)
    inputs = drawn.inputs(torch.bfloat16, "cuda")
    layout, problem = inputs.options["layout"], inputs.problem
    inputs.k[inputs.k.isnan()], inputs.v[inputs.v.isnan()] = 0.0, 0.0
    pages, out = inputs.k.shape[0], torch.empty_like(inputs.q)
    rung.run(problem, inputs.q, inputs.k, inputs.v, out, None)
    graphs = [torch.cuda.CUDAGraph() for _ in range(2)]
    for graph in graphs:
        with torch.cuda.graph(graph):
            rung.run(problem, inputs.q, inputs.k, inputs.v, out, None)
    for lens in ((1, 0, 2500, 600), (3000, 3000, 3000, 3000), (15, 16, 17, 2999)):
        table = torch.randint(pages, layout.page_table.shape, device="cuda", dtype=torch.int32)
        layout.page_table.copy_(table)
        layout.seq_lens.copy_(torch.tensor(lens, dtype=torch.int32))
        inputs.q.normal_()
        options = Options(causal=True, layout=Paged(table, layout.seq_lens.clone()))
        fresh = describe(inputs.q, inputs.k, inputs.v, options)
        for graph in reversed(graphs):
            out.fill_(float("nan"))
            graph.replay()
            judged = verdict(fresh, inputs.q, inputs.k, inputs.v, out)
            assert judged.right, f"{lens}: {judged}"


def test_two_streams_at_once() -> None:
    rung = needs_paged()
    both = [random_case(seed).inputs(torch.bfloat16, "cuda") for seed in (3, 11)]
    expected = [run(rung, inputs)[0] for inputs in both]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in both]
    outs: list[list[torch.Tensor]] = [[], []]
    for _ in range(10):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                outs[i].append(run(rung, both[i])[0])
    torch.cuda.synchronize()
    for i, each in enumerate(outs):
        assert all(torch.equal(out, expected[i]) for out in each)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("q_len", [1, 5])
def test_float8_cache_with_scales(dtype: torch.dtype, head_dim: int, q_len: int) -> None:
    lens = (0, 1, 15, 16, 17, 400, 2111)
    case = Case("fp8", tuple((q_len, n) for n in lens), 8, 2, head_dim, "paged", causal=True)
    inputs = case.inputs(dtype, "cuda")
    k, v = inputs.k.to(FP8), inputs.v.to(FP8)  # NaN stays NaN
    k_scale, v_scale = torch.rand(2, 2, device="cuda").add_(0.25)
    layout = replace(inputs.options["layout"], k_scale=k_scale, v_scale=v_scale)
    assert wrong(needs_paged(), Inputs(inputs.q, k, v, {**inputs.options, "layout": layout})) is None
