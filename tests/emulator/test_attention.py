"""Every CUDA rung of attention in the emulator, on small odd problems, against the oracle.

With three SMs each block of a persistent kernel has several tiles to work on, which small problems on a
real GPU do not give it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from cuda_emulator import emulated_gpu

from strobe.attention import attention, ladder
from strobe.attention.cases import CORRECTNESS, Case
from strobe.attention.check import verdict
from strobe.attention.ladder import Rung
from strobe.attention.prefill import cuda_split_kv

RUNGS = [rung for rung in ladder.RUNGS.values() if rung.name.startswith("cuda_")]
SMALL = (
    Case("odd_causal", ((37, 70),) * 2, causal=True),
    Case("more_queries_than_keys", ((70, 20),), q_heads=2, kv_heads=1, causal=True),
    Case("no_keys", ((3, 0),)),
    Case("window_softcap_sinks", ((40, 150),), window=(60, 4), softcap=8.0, sinks=True),
    Case("packed", ((5, 5), (130, 140), (0, 9), (1, 100), (20, 3), (17, 0)), layout="packed", causal=True),
    Case("paged_packed", ((33, 33), (1, 90), (0, 5), (50, 100), (1, 1)), layout="paged_packed", causal=True),
    Case("paged", tuple((1, n) for n in (0, 1, 15, 16, 17, 150)), 8, layout="paged", causal=True),
)


def check(rung: Rung, cases: list[Case], dtype: torch.dtype, wrong: Callable[..., str | None]) -> None:
    failures = [failure for case in cases if (failure := wrong(rung, case, dtype))]
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("rung", RUNGS, ids=str)
def test_small_problems(rung: Rung, wrong: Callable[..., str | None]) -> None:
    check(rung, [*SMALL], torch.bfloat16, wrong)


@pytest.mark.parametrize("rung", RUNGS, ids=str)
def test_case_table(rung: Rung, wrong: Callable[..., str | None], request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--emulate-all", default=False):
        pytest.skip("the whole case table takes half an hour in the emulator; --emulate-all runs it")
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for head_dim in (48, 64, 96, 128, 256):
            check(rung, [replace(case, head_dim=head_dim) for case in CORRECTNESS], dtype, wrong)


@pytest.mark.parametrize("layout", ["dense", "packed", "paged_packed"])
@pytest.mark.parametrize("kernel", ["cuda_async", "cuda_hopper"])
def test_calls_like_one_before_run_on_their_own_tensors(kernel: str, layout: str) -> None:
    """What was packed for the first call serves others at other addresses, also at odd ones."""
    case = Case("alike", ((70, 90),) * 2, layout=layout, causal=True, softcap=9.0, sinks=True)
    inputs = case.inputs(torch.bfloat16)
    with emulated_gpu(2):
        for shifted in (0, 0, 1, 0):
            q, k, v = (moved(torch.randn_like(x), shifted) for x in (inputs.q, inputs.k, inputs.v))
            out, lse = attention(q, k, v, **inputs.options, kernel=kernel, return_lse=True)
            problem = replace(inputs.problem, device="cuda", arch=90)
            judged = verdict(problem, q, k, v, out, lse)
            assert judged.right, f"{shifted} elements off: {judged}"


def moved(x: torch.Tensor, elements: int) -> torch.Tensor:
    """The same numbers, so many elements past an address that vectors are read from."""
    room = torch.empty(x.numel() + elements, dtype=x.dtype)[elements:]
    return room.view(x.shape).copy_(x)


@pytest.mark.parametrize("splits", [1, 2, 5])
def test_keys_split_any_number_of_ways(splits: int) -> None:
    inputs = Case("", ((70, 300),), 2, 1, causal=True).inputs(torch.bfloat16)
    out, lse = torch.full_like(inputs.q, float("nan")), torch.full((1, 2, 70), float("nan"))
    with emulated_gpu(3):
        problem, tile = inputs.problem, cuda_split_kv.Tile(splits=splits)
        cuda_split_kv.run(problem, inputs.q, inputs.k, inputs.v, out, lse, tile)
        judged = verdict(problem, inputs.q, inputs.k, inputs.v, out, lse)
    assert judged.right, str(judged)
