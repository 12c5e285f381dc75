"""The decode ladder on a GPU: the case table, random caches, graphs, repeats, streams, float8.

Outputs are poisoned with NaN, and so is every slot of the cache that holds no key of a row.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from decode_cases import (
    FP8_SHAPES,
    LONG,
    ONE_ROW,
    OTHER_RANDOM,
    PLAIN,
    PLAIN_VARIANTS,
    RAGGED,
    RANDOM,
    STRIDES,
    VARIANTS,
    Variant,
    compile_all,
    fp8_case,
    in_float8,
    problem_of,
    random_case,
    random_dense,
    strided,
)  # fmt: skip
from judged import judged

from strobe.attention import ladder
from strobe.attention.api import attention
from strobe.attention.cases import CORRECTNESS, Case, Inputs
from strobe.attention.check import verdict
from strobe.attention.decode import cuda_cluster, cuda_paged
from strobe.attention.inputs import describe
from strobe.attention.problem import DECODE_MAX_Q_LEN, Options, Paged
from strobe.ops import cache, rope

pytestmark = pytest.mark.gpu

RUNGS = [rung for rung in ladder.DECODE if rung.name.startswith(("cuda_", "triton_"))]
CASES = [
    case
    for case in CORRECTNESS
    if case.layout.startswith("paged")
    or (case.layout == "dense" and max(q for q, _ in case.rows) <= DECODE_MAX_Q_LEN)
]
DENSE = Case("dense", ((2, 5001),) * 3, 32, 8, 128, causal=True)

variants = pytest.mark.parametrize("variant", VARIANTS, ids=str)
plain = pytest.mark.parametrize("variant", list(PLAIN_VARIANTS), ids=str)


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    compile_all(
        (
            *(
                (variant, problem_of(case))
                for variant in VARIANTS
                for case in (PLAIN, RAGGED, RANDOM, ONE_ROW)
            ),
            *(
                (variant, problem_of(case))
                for variant in PLAIN_VARIANTS
                for case in (*LONG, OTHER_RANDOM, DENSE)
            ),
            *(
                (variant, problem_of(fp8_case(dim, q_len), dtype, "float8_e4m3fn"))
                for variant in PLAIN_VARIANTS
                for dim, q_len, dtype in FP8_SHAPES
            ),
        )
    )


@pytest.mark.parametrize("rung", RUNGS, ids=str)
@pytest.mark.parametrize(("head_dim", "dtype"), [(128, torch.bfloat16), (64, torch.float16)], ids=str)
def test_case_table(rung: ladder.Rung, head_dim: int, dtype: torch.dtype) -> None:
    cases = [replace(case, head_dim=head_dim) for case in CASES]
    if rung.module in (cuda_paged, cuda_cluster):
        few = [case for case in cases if max(q for q, _ in case.rows) <= DECODE_MAX_Q_LEN]
        name = str(dtype).removeprefix("torch.")
        compile_all((Variant("", rung.module), problem_of(case, name)) for case in few)
    ran, failures, reasons = 0, [], set()
    for case in cases:
        inputs = case.inputs(dtype, "cuda")
        if refused := rung.refusals(inputs.problem):
            reasons.update(refused)
            continue
        ran += 1
        found = judged(rung.run, inputs)
        if not found.right:
            failures.append(f"{case}: {found}")
    assert not failures, "\n".join(failures)
    if not ran:
        pytest.skip(f"{rung} refuses: {'; '.join(sorted(reasons)[:3])}")


@variants
def test_random_caches(variant: Variant) -> None:
    cases = [random_case(random.randrange(2**31)) for _ in range(10)]
    dtype = random.choice(["bfloat16", "float16"])
    float8 = random.random() < 0.5
    compile_all((variant, problem_of(case, dtype, "float8_e4m3fn" if float8 else None)) for case in cases)
    failures = []
    for case in cases:
        inputs = case.inputs(getattr(torch, dtype), "cuda")
        if failure := variant.wrong(in_float8(inputs) if float8 else inputs):
            failures.append(f"{case!r} in {dtype}, float8 {float8}: {failure}")
    assert not failures, "\n".join(failures)


@plain
def test_random_dense_calls(variant: Variant) -> None:
    cases = [random_dense(random.randrange(2**31)) for _ in range(10)]
    dtype = random.choice(["bfloat16", "float16"])
    compile_all((variant, problem_of(case, dtype)) for case in cases)
    failures = []
    for case in cases:
        inputs, how = case.inputs(getattr(torch, dtype), "cuda"), random.choice(STRIDES)
        if failure := variant.wrong(strided(inputs, how)):
            failures.append(f"{case!r} in {dtype}, {how}: {failure}")
    assert not failures, "\n".join(failures)


@plain
@pytest.mark.parametrize("how", STRIDES)
def test_dense_keys_in_any_strides(variant: Variant, how: str) -> None:
    inputs = strided(DENSE.inputs(torch.bfloat16, "cuda"), how)
    assert variant.wrong(inputs) is None
    first, first_lse = variant.run(inputs)
    for _ in range(20):
        out, lse = variant.run(inputs)
        assert torch.equal(out, first)
        assert torch.equal(lse, first_lse)


@plain
def test_graphs_of_dense_calls(variant: Variant) -> None:
    """Two, each of a chain of calls, captured one after the other and replayed in the other order."""
    inputs = DENSE.inputs(torch.bfloat16, "cuda")
    q, kernel = inputs.q, variant.rung.__name__.rsplit(".", 1)[-1]
    graphs, outs = [torch.cuda.CUDAGraph() for _ in range(2)], []
    for graph in graphs:
        with torch.cuda.graph(graph):
            given = q
            for _ in range(3):
                given = attention(given, inputs.k, inputs.v, causal=True, kernel=kernel)
            outs.append(given)
    for _ in range(3):
        expected = q.normal_()
        for _ in range(3):
            expected = attention(expected, inputs.k, inputs.v, causal=True, kernel=kernel)
        for graph, out in reversed(list(zip(graphs, outs, strict=True))):
            out.fill_(float("nan"))
            graph.replay()
            assert torch.equal(out, expected)


@variants
def test_rows_with_fewer_queries_than_others(variant: Variant) -> None:
    """Packed rows of 0 to 7 queries, 16 heads a group: most rows lack most blocks of query rows."""
    assert variant.wrong(RAGGED.inputs(torch.bfloat16, "cuda")) is None


@plain
@pytest.mark.parametrize("case", LONG, ids=str)
def test_long_rows_are_split_and_merged(variant: Variant, case: Case) -> None:
    assert variant.wrong(case.inputs(torch.bfloat16, "cuda")) is None


@plain
def test_rows_may_share_pages(variant: Variant) -> None:
    """A common prefix, as a prefix cache gives it."""
    inputs = PLAIN.inputs(torch.bfloat16, "cuda")
    inputs.options["layout"].page_table[:, :10] = inputs.options["layout"].page_table[1, :10].clone()
    assert variant.wrong(inputs) is None


@plain
def test_layers_of_one_cache_and_strided_queries(variant: Variant) -> None:
    """k and v as one layer's slice of a larger cache, q as a slice of a fused projection."""
    inputs = PLAIN.inputs(torch.bfloat16, "cuda")
    pages = torch.randn(5, inputs.k.shape[0], 2, *inputs.k.shape[1:], device="cuda").bfloat16()
    q = torch.randn(3, 1, 12, 128, device="cuda").bfloat16()[:, :, 2:10]
    assert variant.wrong(Inputs(q, pages[3, :, 0], pages[3, :, 1], inputs.options)) is None


@variants
def test_repeats_give_the_same_bits(variant: Variant) -> None:
    for case in (RANDOM, ONE_ROW):
        inputs = case.inputs(torch.bfloat16, "cuda")
        first_out, first_lse = variant.run(inputs)
        for _ in range(20):
            out, lse = variant.run(inputs)
            assert torch.equal(out, first_out)
            assert torch.equal(lse, first_lse)


def test_a_rows_bits_do_not_depend_on_its_batch() -> None:
    """What a deterministic engine asks of cuda_cluster."""
    case = Case("", tuple((1, n) for n in (700, 3, 5000, 1, 64)), 8, 2, 128, "paged", causal=True)
    inputs, variant = case.inputs(torch.bfloat16, "cuda"), Variant("cluster", cuda_cluster)
    together, _ = variant.run(inputs)
    layout = inputs.options["layout"]
    for row in range(5):
        alone = Paged(layout.page_table[row : row + 1], layout.seq_lens[row : row + 1])
        out, _ = variant.run(
            Inputs(inputs.q[row : row + 1], inputs.k, inputs.v, {**inputs.options, "layout": alone})
        )
        assert torch.equal(out[0], together[row])


@variants
def test_graphs_replay_with_other_lengths_and_tables(variant: Variant) -> None:
    """Two graphs over one layout, each replayed first in its turn."""
    drawn = Case("graph", tuple((1, n) for n in (900, 3000, 17, 1)), 8, 2, 128, "paged", causal=True)
    inputs = drawn.inputs(torch.bfloat16, "cuda")
    layout, problem = inputs.options["layout"], inputs.problem
    inputs.k[inputs.k.isnan()], inputs.v[inputs.v.isnan()] = 0.0, 0.0
    variant.run(inputs)
    pages, out = inputs.k.shape[0], torch.empty_like(inputs.q)
    graphs = [torch.cuda.CUDAGraph() for _ in range(2)]
    for graph in graphs:
        with torch.cuda.graph(graph):
            for _ in range(3):  # one behind the other, as layers are
                variant.rung.run(problem, inputs.q, inputs.k, inputs.v, out, None, variant.shape(problem))
    for lens in ((1, 0, 2500, 600), (3000, 3000, 3000, 3000), (15, 16, 17, 2999)):
        table = torch.randint(pages, layout.page_table.shape, device="cuda", dtype=torch.int32)
        layout.page_table.copy_(table)
        layout.seq_lens.copy_(torch.tensor(lens, dtype=torch.int32))
        inputs.q.normal_()
        fresh_layout = Paged(table, layout.seq_lens.clone())
        fresh = describe(inputs.q, inputs.k, inputs.v, Options(causal=True, layout=fresh_layout))
        for graph in reversed(graphs):
            out.fill_(float("nan"))
            torch.cuda.synchronize()  # `settled` promises that lengths and tables are long written
            graph.replay()
            judged = verdict(fresh, inputs.q, inputs.k, inputs.v, out)
            assert judged.right, f"{lens}: {judged}"


@variants
def test_chain_of_append_and_attention(variant: Variant) -> None:
    """Layers in a graph: each appends a token's key and value, and attends right behind, to its answer."""
    layers, heads, kv_heads, dim = 6, 8, 2, 128
    lens = torch.tensor([700, 16, 33, 2048], dtype=torch.int32, device="cuda")
    rows, columns = len(lens), 130
    table = torch.randperm(rows * columns, device="cuda").int().view(rows, columns)
    layout = Paged(table, lens, max_kv_len=2048)
    stored = torch.randn(layers, 2, rows * columns, 16, kv_heads, dim, device="cuda").bfloat16()
    positions = (lens - 1).long()
    slots = table[torch.arange(rows, device="cuda"), positions // 16].long() * 16 + positions % 16
    turn = rope.angles(
        positions, rope.signed([1e4 ** (-2 * i / dim) for i in range(dim // 2)], "cuda"), torch.bfloat16
    )
    fused = torch.randn(layers, rows, heads + 2 * kv_heads, dim, device="cuda").bfloat16()
    outs = torch.empty(layers, rows, 1, heads, dim, device="cuda").bfloat16()

    def layer(i: int, shaped: Variant, out: torch.Tensor) -> None:
        qk, v = fused[i].split_with_sizes((heads + kv_heads, kv_heads), 1)
        q = cache.append_rotated(qk, v, turn, stored[i, 0], stored[i, 1], slots).unsqueeze(1)
        problem = describe(q, stored[i, 0], stored[i, 1], Options(causal=True, layout=layout))
        shaped.rung.run(problem, q, stored[i, 0], stored[i, 1], out, None, shaped.shape(problem))

    expected = torch.empty_like(outs)
    same = Variant("", variant.rung, {**variant.changes, "settled": False})
    layer(0, variant, outs[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(layers):
            layer(i, variant, outs[i])
    for _ in range(5):
        fused.normal_()
        for i in range(layers):
            layer(i, same, expected[i])
            torch.cuda.synchronize()
        for i in range(layers):  # what the graph must write again before it is read
            for half in stored[i]:
                half.view(-1, kv_heads, dim)[slots] = float("nan")
        outs.fill_(float("nan"))
        torch.cuda.synchronize()
        graph.replay()
        assert torch.equal(outs, expected)


@plain
def test_two_streams_at_once(variant: Variant) -> None:
    both = [case.inputs(torch.bfloat16, "cuda") for case in (RANDOM, OTHER_RANDOM)]
    expected = [variant.run(inputs)[0] for inputs in both]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in both]
    outs: list[list[torch.Tensor]] = [[], []]
    for _ in range(10):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                outs[i].append(variant.run(both[i])[0])
    torch.cuda.synchronize()
    for i, each in enumerate(outs):
        assert all(torch.equal(out, expected[i]) for out in each)


@plain
@pytest.mark.parametrize(("head_dim", "q_len", "dtype"), FP8_SHAPES)
def test_float8_cache_with_scales(variant: Variant, head_dim: int, q_len: int, dtype: str) -> None:
    inputs = fp8_case(head_dim, q_len).inputs(getattr(torch, dtype), "cuda")
    assert variant.wrong(in_float8(inputs)) is None
