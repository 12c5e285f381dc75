"""What is the Hopper rung's own: its tiles, its tile counter, rows that share tiles with others' keys."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from strobe.attention.api import attention, empty_lse
from strobe.attention.cases import Case, Inputs
from strobe.attention.check import Verdict, verdict
from strobe.attention.prefill import cuda_hopper
from strobe.attention.prefill.cuda_hopper import TILES, Tile
from strobe.cuda import jit

pytestmark = pytest.mark.gpu

THREE = Tile(consumers=3)


@pytest.fixture(autouse=True)
def _on_hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")


@pytest.fixture(scope="module", autouse=True)
def _compiled_side_by_side() -> None:
    problems = [
        (replace(case, head_dim=head_dim).inputs(torch.bfloat16).problem, tile)
        for case in LONG
        for head_dim, tile in (*TILES.items(), (64, THREE))
    ]
    sources = [jit.Source(cuda_hopper._SOURCE, cuda_hopper.defines(*each)) for each in problems]
    jit.warm(sources, "sm_90a")


def judge(inputs: Inputs, tile: Tile | None = None) -> Verdict:
    problem = inputs.problem
    out = torch.full_like(inputs.q, float("nan"), memory_format=torch.contiguous_format)
    lse = empty_lse(problem, inputs.q).fill_(float("nan"))
    cuda_hopper.run(problem, inputs.q, inputs.k, inputs.v, out, lse, tile)
    return verdict(problem, inputs.q, inputs.k, inputs.v, out, lse)


LONG = (
    Case("many_tiles", ((777, 1501),) * 3, q_heads=8, kv_heads=4, causal=True),
    Case("many_full_tiles", ((513, 900),) * 5, q_heads=16, kv_heads=2),
    Case("many_windows", ((1300, 1300),) * 2, q_heads=8, kv_heads=8, window=(300, 20)),
    Case("packed_mix", ((1, 1), (700, 703), (0, 6), (65, 74), (1025, 1037)), layout="packed", causal=True),
    Case("paged_mix", ((500, 2000), (1, 129), (0, 40)), 8, 2, 64, "paged_packed", 32, causal=True),
    Case("paged_16", ((512, 1111),) * 2, 8, 2, layout="paged", page_size=16, causal=True),
    Case("paged_128", ((300, 1111),) * 2, 8, 2, layout="paged", page_size=128),
    Case("long_softcap_sinks", ((600, 1000),), 8, 2, softcap=20.0, sinks=True, causal=True),
)  # fmt: skip


@pytest.mark.parametrize("head_dim", cuda_hopper.HEAD_DIMS)
@pytest.mark.parametrize("case", LONG, ids=str)
def test_long_rows(case: Case, head_dim: int) -> None:
    judged = judge(replace(case, head_dim=head_dim).inputs(torch.bfloat16, "cuda"))
    assert judged.right, judged


@pytest.mark.parametrize("case", LONG, ids=str)
def test_three_consumers(case: Case) -> None:
    judged = judge(case.inputs(torch.bfloat16, "cuda"), THREE)
    assert judged.right, judged


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("offset", [-400.0, 400.0])
def test_scores_far_from_zero(offset: float, causal: bool) -> None:
    """For two rows of three, and for the keys that a consumer begins with: at either end."""
    inputs = Case("far", ((300, 1100),) * 2, 8, 4, 128, causal=causal).inputs(torch.bfloat16, "cuda")
    inputs.q[..., 0] = 128**0.5  # 1 / scale
    inputs.q[:, ::3, :, 0] = 0.0
    for keys in (slice(None), slice(128), slice(1024, None)):
        inputs.k[..., 0] = 0.0
        inputs.k[:, keys, :, 0] = offset
        judged = judge(inputs)
        assert judged.right, judged


WAYS = {
    "plain": Tile(),
    "bulk_store": Tile(bulk_store=True),
    "three_q": Tile(bulk_store=True, q_stages=3),
    "three": Tile(consumers=3, keys=64),
    "three_bulk": Tile(consumers=3, keys=64, bulk_store=True),
}
WAY_CASES = (
    Case("small", ((512, 512),), 32, 8, causal=True),
    Case("many", ((300, 300),) * 40, 16, 4, causal=True),
    Case("odd_tiles", ((640, 1408),) * 9, 16, 16, causal=True),
    Case("full", ((513, 900),) * 15, 16, 2),
    Case("one_query", ((1, 70),) * 3, 8, 2),
)
FOLDS = (
    Case("small", ((512, 512),), 32, 8, causal=True),
    Case("odd", ((333, 777),), 16, 8, window=(-1, 5)),
    Case("one_block_of_rows", ((30, 300),) * 3, 16, 2, causal=True),
    Case("more_tiles_than_sms", ((190, 190),) * 9, 16, 16, causal=True, softcap=20.0, sinks=True),
)


@pytest.mark.parametrize(
    ("case", "tile"), [(case, tile) for case in WAY_CASES for tile in WAYS.values()], ids=str
)
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_ways_of_working(case: Case, head_dim: int, tile: Tile) -> None:
    """Those that choose_tile does not take: right, and the same bits twenty times."""
    inputs = replace(case, head_dim=head_dim).inputs(torch.bfloat16, "cuda")
    assert not cuda_hopper.refusals_for_tile(inputs.problem, tile)
    judged = judge(inputs, tile)
    assert judged.right, judged
    runs = [torch.full_like(inputs.q, float("nan")) for _ in range(20)]
    for out in runs:
        cuda_hopper.run(inputs.problem, inputs.q, inputs.k, inputs.v, out, None, tile)
    assert all(torch.equal(runs[0], out) for out in runs[1:])


@pytest.mark.parametrize("case", FOLDS, ids=str)
@pytest.mark.parametrize("head_dim", cuda_hopper.HEAD_DIMS)
def test_folded_tiles(case: Case, head_dim: int) -> None:
    inputs = replace(case, head_dim=head_dim).inputs(torch.float16, "cuda")
    for bulk_store in (False, True):
        tile = replace(TILES[head_dim], folded=True, bulk_store=bulk_store)
        if not cuda_hopper.refusals_for_tile(inputs.problem, tile):
            judged = judge(inputs, tile)
            assert judged.right, (tile, judged)


@pytest.mark.parametrize("way", WAYS)
def test_ways_of_working_in_a_graph(way: str) -> None:
    """Each launch reads what the one before wrote: one that started too early would read too early."""
    inputs = Case("chained", ((700, 700),) * 2, 8, 8, causal=True).inputs(torch.bfloat16, "cuda")
    problem, tile = inputs.problem, WAYS[way]
    outs = [torch.empty_like(inputs.q) for _ in range(6)]

    def chain() -> None:
        query = inputs.q
        for out in outs:
            cuda_hopper.run(problem, query, inputs.k, inputs.v, out, None, tile)
            query = out

    chain()
    eager = [out.clone() for out in outs]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain()
    for _ in range(5):
        for out in outs:
            out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(out, expected) for out, expected in zip(outs, eager, strict=True))
    plain = torch.empty_like(inputs.q)
    cuda_hopper.run(problem, outs[-2], inputs.k, inputs.v, plain, None)
    torch.testing.assert_close(outs[-1], plain, atol=2e-2, rtol=2e-2)


def test_tiles_without_keys_hold_nobody_up() -> None:
    """More tiles than blocks, most of them past a short row's end or above every key."""
    short = ((2048, 2048), *((1, 700),) * 63)
    for case in (
        Case("mixed", short, 32, 8, layout="paged_packed", page_size=16, causal=True),
        Case("packed", ((1500, 1500), *((3, 5),) * 200), 8, 8, layout="packed", causal=True),
        Case("above", ((3000, 100),) * 4, 16, 16, causal=True),
    ):
        judged = judge(case.inputs(torch.bfloat16, "cuda"))
        assert judged.right, (case, judged)


def test_prepared_calls_follow_their_tensors() -> None:
    """attention() prepares once a signature: other tensors, streams and graphs must be followed."""
    case = Case("planned", ((300, 300),) * 2, 8, 2, causal=True)
    sets = [case.inputs(torch.bfloat16, "cuda", seed) for seed in range(4)]
    expected = []
    for inputs in sets:
        out = torch.empty_like(inputs.q)
        cuda_hopper.run(inputs.problem, inputs.q, inputs.k, inputs.v, out, None)
        expected.append(out)
    other = torch.cuda.Stream()
    torch.cuda.synchronize()
    for stream in (torch.cuda.current_stream(), other):
        with torch.cuda.stream(stream):
            for _ in range(3):
                for inputs, right in zip(sets, expected, strict=True):
                    out = attention(inputs.q, inputs.k, inputs.v, kernel="cuda_hopper", **inputs.options)
                    assert torch.equal(out, right)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [attention(i.q, i.k, i.v, kernel="cuda_hopper", **i.options) for i in sets]
    sets[0].q.neg_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(out, right) for out, right in zip(captured[1:], expected[1:], strict=True))
    assert torch.equal(captured[0], attention(sets[0].q, sets[0].k, sets[0].v, **sets[0].options))


@pytest.mark.parametrize("toward", ["first", "last"])
@pytest.mark.parametrize("head_dim", [64, 256])
def test_maxima_that_keep_growing(toward: str, head_dim: int) -> None:
    """Each key tile outgrows the one before it by more than 16 bits hold, so every step must rescale."""
    inputs = Case("growing", ((200, 1500),), 4, 2, head_dim, causal=True).inputs(torch.bfloat16, "cuda")
    slope = torch.linspace(0, 60, 1500, device="cuda")[:, None, None]
    inputs.q[:], inputs.k[:] = (
        inputs.q.abs(),
        inputs.k.abs() * (slope if toward == "last" else slope.flip(0)) / 8,
    )
    judged = judge(inputs)
    assert judged.right, judged


def test_one_row_of_nan_spoils_no_other() -> None:
    """A packed row's last tile also loads the next row's first keys."""
    case = Case("neighbours", ((100, 70), (90, 200), (128, 128)), q_heads=4, kv_heads=2, layout="packed")
    inputs = case.inputs(torch.bfloat16, "cuda")
    clean = torch.empty_like(inputs.q)
    cuda_hopper.run(inputs.problem, inputs.q, inputs.k, inputs.v, clean, None)
    for tensor in (inputs.k, inputs.v):
        tensor[70:270] = float("nan")
    out = torch.empty_like(inputs.q)
    cuda_hopper.run(inputs.problem, inputs.q, inputs.k, inputs.v, out, None)
    assert torch.equal(out[:100], clean[:100])
    assert torch.equal(out[190:], clean[190:])
    assert out[100:190].isnan().all()


def test_nan_scores_stay_visible() -> None:
    inputs = Case("nan_key", ((130, 300),), q_heads=2, kv_heads=1).inputs(torch.bfloat16, "cuda")
    inputs.k[0, 17] = float("nan")
    out = torch.zeros_like(inputs.q)
    cuda_hopper.run(inputs.problem, inputs.q, inputs.k, inputs.v, out, None)
    assert out.isnan().all()


@pytest.mark.parametrize("head_dim", cuda_hopper.HEAD_DIMS)
def test_same_bits_twenty_times(head_dim: int) -> None:
    inputs = Case("repeat", ((1500, 1500),) * 2, 16, 8, head_dim, causal=True).inputs(torch.bfloat16, "cuda")
    runs = []
    for _ in range(20):
        out = torch.full_like(inputs.q, float("nan"))
        cuda_hopper.run(inputs.problem, inputs.q, inputs.k, inputs.v, out, None)
        runs.append(out)
    assert all(torch.equal(runs[0], out) for out in runs[1:])


def test_two_streams_at_once() -> None:
    """Each stream draws its tiles from a counter of its own."""
    inputs = Case("streams", ((2000, 2000),) * 2, q_heads=16, kv_heads=16, causal=True).inputs(
        torch.bfloat16, "cuda"
    )
    outs = [[torch.full_like(inputs.q, float("nan")) for _ in range(8)] for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in outs]
    torch.cuda.synchronize()
    for i in range(8):
        for stream, mine in zip(streams, outs, strict=True):
            with torch.cuda.stream(stream):
                cuda_hopper.run(inputs.problem, inputs.q, inputs.k, inputs.v, mine[i], None)
    torch.cuda.synchronize()
    assert all(torch.equal(out, outs[0][0]) for mine in outs for out in mine)
    assert verdict(inputs.problem, inputs.q, inputs.k, inputs.v, outs[0][0]).right


def test_graphs_replayed_beside_eager_calls() -> None:
    inputs = Case("replayed", ((1000, 1000),) * 4, q_heads=16, kv_heads=4, causal=True).inputs(
        torch.bfloat16, "cuda"
    )
    eager, replayed = (torch.empty_like(inputs.q) for _ in range(2))
    cuda_hopper.run(inputs.problem, inputs.q, inputs.k, inputs.v, eager, None)
    right = eager.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(4):
            cuda_hopper.run(inputs.problem, inputs.q, inputs.k, inputs.v, replayed, None)
    other = torch.cuda.Stream()
    for _ in range(5):
        replayed.fill_(float("nan"))
        eager.fill_(float("nan"))
        torch.cuda.synchronize()
        with torch.cuda.stream(other):
            graph.replay()
        for _ in range(4):
            cuda_hopper.run(inputs.problem, inputs.q, inputs.k, inputs.v, eager, None)
        torch.cuda.synchronize()
        assert torch.equal(eager, right)
        assert torch.equal(replayed, right)


@pytest.mark.parametrize("page_size", [8, 16, 64, 128])
@pytest.mark.parametrize("head_dim", [64, 96, 256])
def test_pages_of_keys_and_values_in_turns(head_dim: int, page_size: int) -> None:
    """Pages that follow one another, and pages that do not: one tensor holds both."""
    rows = ((500, 2000), (1, 129), (0, 40), (333, 1111))
    case = Case("in_turns", rows, 8, 2, head_dim, "paged_packed", page_size, causal=True)
    inputs = case.inputs(torch.bfloat16, "cuda")
    k, v = torch.stack((inputs.k, inputs.v), 1).unbind(1)
    assert judge(inputs).right
    out = torch.full_like(inputs.q, float("nan"))
    cuda_hopper.run(inputs.problem, inputs.q, k, v, out, None)
    assert verdict(inputs.problem, inputs.q, inputs.k, inputs.v, out).right


@pytest.mark.parametrize("length", [512, 1024])
def test_many_launches_of_one_graph(length: int) -> None:
    """Fewer tiles than SMs, and more; each launch draws its tiles from a counter of its own."""
    inputs = Case("captured", ((length, length),), 32, 8, 128, causal=True).inputs(torch.bfloat16, "cuda")
    outs = [torch.empty_like(inputs.q) for _ in range(30)]

    def run() -> None:
        for out in outs:
            cuda_hopper.run(inputs.problem, inputs.q, inputs.k, inputs.v, out, None)

    run()
    assert verdict(inputs.problem, inputs.q, inputs.k, inputs.v, outs[0]).right
    right = outs[0].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for _ in range(3):
        for out in outs:
            out.fill_(float("nan"))
        for _ in range(4):
            graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(out, right) for out in outs)


def test_more_heads_than_a_grid_dimension_holds() -> None:
    case = Case("many_heads", ((9, 20),) * 257, q_heads=256, kv_heads=2, causal=True)
    judged = judge(case.inputs(torch.bfloat16, "cuda"))
    assert judged.right, judged


def test_tensors_beyond_two_to_the_31_elements() -> None:
    """The last queries of a window see only the last keys: compare with these alone."""
    length, heads, near = (1 << 18) + 100, 64, 400
    inputs = Case("huge", ((length, length),), heads, heads, 128, window=(127, 0)).inputs(
        torch.bfloat16, "cuda"
    )
    assert inputs.q.numel() > 2**31
    out = torch.full_like(inputs.q, float("nan"))
    cuda_hopper.run(inputs.problem, inputs.q, inputs.k, inputs.v, out, None)
    tail = Inputs(inputs.q[:, -200:], inputs.k[:, -near:], inputs.v[:, -near:], inputs.options)
    judged = verdict(tail.problem, tail.q, tail.k, tail.v, out[:, -200:])
    assert judged.right, judged
    assert not out[:, :: length // 50].isnan().any()


def test_expanded_inputs() -> None:
    inputs = Case("expanded", ((150, 150),) * 3, q_heads=6, kv_heads=6).inputs(torch.float16, "cuda")
    one = Inputs(
        inputs.q, inputs.k[:1].expand(3, -1, -1, -1), inputs.v[:, :, :1].expand(-1, -1, 6, -1), inputs.options
    )
    judged = judge(one)
    assert judged.right, judged


def test_every_tiling_fits_shared_memory() -> None:
    limit = torch.cuda.get_device_properties(0).shared_memory_per_block_optin
    assert all(tile.shared_bytes(head_dim) <= limit for head_dim, tile in TILES.items())
