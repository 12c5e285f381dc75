"""The Hopper rung where it has more work than blocks, and in the ways of working that must be named."""

from __future__ import annotations

import random
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from cuda_emulator import emulated_gpu

from strobe.attention import Paged
from strobe.attention.api import attention, empty_lse
from strobe.attention.cases import Case
from strobe.attention.check import verdict
from strobe.attention.prefill import cuda_hopper
from strobe.attention.prefill.cuda_hopper import Tile
from strobe.cuda import jit


def answer(case: Case, tile: Tile | None, sm_count: int) -> torch.Tensor:
    """The rung's answer on fresh inputs, once it was found right."""
    seed = random.randrange(2**31)
    inputs = case.inputs(torch.bfloat16, seed=seed)
    out = torch.full_like(inputs.q, float("nan"))
    with emulated_gpu(sm_count):
        problem = inputs.problem
        if tile is not None:
            assert not cuda_hopper.refusals_for_tile(problem, tile)
        lse = empty_lse(problem, inputs.q).fill_(float("nan"))
        cuda_hopper.run(problem, inputs.q, inputs.k, inputs.v, out, lse, tile)
        judged = verdict(problem, inputs.q, inputs.k, inputs.v, out, lse)
    assert judged.right, f"{case!r}, seed {seed}: {judged}"
    return out


@pytest.mark.parametrize(
    "case",
    [
        Case("more_queries_than_keys", ((700, 100),), 2, 1, 64, causal=True),
        Case("no_keys", ((300, 0),), 2, 1, 64, sinks=True),
        Case("short_rows", ((1, 1), (300, 303), (0, 6), (65, 74), (500, 5)), 2, 1, 64, "packed", causal=True),
        Case("window_256", ((150, 400),), 2, 1, 256, window=(130, 8), softcap=20.0, sinks=True),
        Case("ends_apart", ((290, 350),), 2, 1, 256, causal=True),
        Case("ends_apart_packed", ((1, 70), (200, 260), (130, 90)), 2, 1, 192, "packed", window=(90, 3)),
        Case(
            "short_pages", ((300, 400), (1, 129), (0, 40), (3, 7)), 2, 1, 64, "paged_packed", 32, causal=True
        ),
    ],
    ids=str,
)
def test_one_block_has_all_tiles(case: Case) -> None:
    """Also those without keys: past a short row's end, and of queries above every key."""
    answer(case, None, sm_count=1)


def test_packed_tiles_are_all_found() -> None:
    """More rows than the warp that looks for a tile has lanes, many of them empty; few blocks and many."""
    rows = tuple(
        (random.choice([0, 1, 3, random.randint(1, 300)]), random.randint(0, 200)) for _ in range(40)
    )
    case = Case("rows", rows, 2, 1, 64, random.choice(["packed", "paged_packed"]), 16, causal=True)
    for sm_count in (1, 40):
        answer(case, None, sm_count)


def test_pages_of_keys_and_values_in_turns() -> None:
    """Pages that do not follow one another, as where one tensor holds both."""
    rows = ((130, 300), (1, 129), (40, 77))
    case = Case("in_turns", rows, 2, 2, 64, "paged_packed", random.choice([8, 16, 32]), causal=True)
    inputs = case.inputs(torch.bfloat16, seed=random.randrange(2**31))
    k, v = torch.stack((inputs.k, inputs.v), 1).unbind(1)
    out = torch.full_like(inputs.q, float("nan"))
    with emulated_gpu(2):
        cuda_hopper.run(inputs.problem, inputs.q, k, v, out, None)
    judged = verdict(inputs.problem, inputs.q, inputs.k, inputs.v, out)
    assert judged.right, str(judged)


def test_planned_calls_follow_their_tensors() -> None:
    """attention() packs a launch once for calls that are alike; each must read and write its own tensors."""
    case = Case("planned", ((100, 130),) * 2, 2, 1, 64, causal=True)
    calls = [case.inputs(torch.bfloat16, seed=random.randrange(2**31)) for _ in range(3)]
    with emulated_gpu(2):
        for inputs in calls * 2:
            out, lse = attention(
                inputs.q, inputs.k, inputs.v, kernel="cuda_hopper", return_lse=True, **inputs.options
            )
            judged = verdict(inputs.problem, inputs.q, inputs.k, inputs.v, out, lse)
            assert judged.right, str(judged)


@pytest.mark.parametrize("keys", [slice(None), slice(128), slice(256, None)], ids=str)
@pytest.mark.parametrize("offset", [-400.0, -20.0, 20.0, 400.0])
def test_scores_far_from_zero(offset: float, keys: slice) -> None:
    """For two rows of three, of all keys, of the first or of the last: whichever a consumer begins with."""
    case = Case("far", ((200, 390),), 2, 1, 128, causal=random.choice([False, True]))
    inputs = case.inputs(torch.bfloat16, seed=random.randrange(2**31))
    inputs.q[..., 0] = 128**0.5  # 1 / scale
    inputs.q[:, ::3, :, 0] = 0.0
    inputs.k[..., 0] = 0.0
    inputs.k[:, keys, :, 0] = offset
    out = torch.full_like(inputs.q, float("nan"))
    lse = empty_lse(inputs.problem, inputs.q).fill_(float("nan"))
    with emulated_gpu(2):
        cuda_hopper.run(inputs.problem, inputs.q, inputs.k, inputs.v, out, lse)
    judged = verdict(inputs.problem, inputs.q, inputs.k, inputs.v, out, lse)
    assert judged.right, str(judged)


WAYS = [
    (64, Tile(bulk_store=True)),
    (64, Tile(consumers=3, bulk_store=True)),
    (96, Tile(bulk_store=True)),
    (128, Tile(bulk_store=True, q_stages=3)),
    (128, Tile(consumers=3, keys=64)),
    (128, Tile(folded=True)),
    (64, Tile(folded=True, bulk_store=True)),
    (256, Tile(keys=64, q_stages=1, folded=True)),
]


@pytest.mark.parametrize(("head_dim", "tile"), WAYS, ids=str)
def test_other_ways_of_working(head_dim: int, tile: Tile) -> None:
    """Fewer blocks than tiles, an odd number of tiles a head, lengths that no tile divides."""
    odd = random.randint(1, tile.queries - 1)
    length = tile.queries + odd
    case = Case("way", ((length, length + random.choice([0, 128])),), 3, 1, head_dim)
    longer = replace(case, rows=((length, length + random.randint(0, 300)),)) if tile.folded else case
    answer(replace(longer, causal=True, softcap=random.choice([0.0, 20.0])), tile, sm_count=2)


def test_what_a_way_cannot_do_is_refused() -> None:
    window = Case("window", ((300, 300),), 2, 1, 64, window=(30, 0)).inputs(torch.bfloat16).problem
    packed = Case("packed", ((30, 30),), 2, 1, 64, "packed").inputs(torch.bfloat16).problem
    for problem, tile, reason in (
        (window, Tile(folded=True), "folded; supported"),
        (packed, Tile(folded=True), "folded; supported"),
        (packed, Tile(bulk_store=True), "bulk_store; supported"),
        (window, Tile(bulk_store=True, q_stages=1), "bulk_store; supported"),
        (window, Tile(consumers=9), "supported: consumers 2, 3"),
        (window, Tile(keys=-1), "keys 64, 96, 128"),
    ):
        hopper = replace(problem, arch=90)
        assert any(reason in given for given in cuda_hopper.refusals_for_tile(hopper, tile)), tile


@pytest.mark.parametrize("kernel", ["auto", "cuda_hopper", "cuda_paged", "cuda_cluster", "cuda_async"])
def test_calls_with_nothing_to_fill_launch_nothing(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No rows, or rows without queries: shapes alone come back."""
    inputs = Case("empty", ((1, 20), (1, 9)), 8, layout="paged", causal=True).inputs(torch.bfloat16)
    layout = inputs.options["layout"]
    with emulated_gpu():
        monkeypatch.setattr(jit, "kernel", None)
        for rows, queries in ((2, 0), (0, 1), (0, 0)):
            q = inputs.q[:rows, :queries]
            part = Paged(layout.page_table[:rows], layout.seq_lens[:rows])
            out, lse = attention(q, inputs.k, inputs.v, layout=part, kernel=kernel, return_lse=True)
            assert out.shape == q.shape
            assert lse.shape == (rows, 8, queries)


def test_a_rung_runs_with_its_tensors_gpu_as_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[int] = []
    with emulated_gpu():
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext(entered.append(index)))
        q = torch.randn(1, 5, 2, 16)
        attention(q, q, q, kernel="torch_naive")
        assert entered == [q.get_device()]
