"""The projection that rotates and appends its heads, in the emulator, against the formula in float64."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from append_cases import KINDS, Case, Heads, draw
from cuda_emulator import emulated_gpu

from strobe.cuda import jit
from strobe.ops import cache


def append(case: Case, sm_count: int = 3) -> torch.Tensor:
    with emulated_gpu(sm_count):
        return case.projection.append(case.x, case.to, "cuda_skinny")


@pytest.mark.parametrize(("heads", "tokens", "page_size", "kind"), KINDS, ids=str)
def test_equals_the_formula(heads: Heads, tokens: int, page_size: int, kind: dict[str, Any]) -> None:
    case = draw(heads, tokens, page_size, **kind)
    case.check(append(case, sm_count=random.randint(1, 5)))


def test_rows_that_only_pad_share_a_slot() -> None:
    """A graph's: equal tokens, all written to one slot, beside others."""
    case = draw(Heads(4, 2, 64), 8, 4, normed=True)
    for each in (case.x, case.positions, *case.to.turn, case.to.slots):
        each[3:] = each[3].clone()
    q = append(case)
    assert torch.equal(q[3:], q[3:4].expand(5, -1, -1))
    case.check(q)


def test_a_call_uses_its_own_addresses() -> None:
    """The packed launch is kept, the cache that it writes to is not."""
    first, again = (draw(Heads(2, 1, 64), 2, 4, inputs=64) for _ in range(2))
    again = replace(again, projection=first.projection)
    for case in (first, again):
        case.check(append(case))
    assert len(first.projection.scratch) == 1


@pytest.mark.parametrize("head_norms", [False, True])
@pytest.mark.parametrize("tokens", [4, 17])
def test_one_launch_or_two(tokens: int, head_norms: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel refuses is projected by a rung that does not, and appended by a launch behind it."""
    case = draw(Heads(4, 2, 64), tokens, 16, biased=True, normed=True)
    if head_norms:
        ones = torch.ones(64).bfloat16()
        options = cache.Options(cache.HeadNorms(ones, ones, 1e6))  # which is 1 / 1000 for every head
        case = replace(case, to=case.to._replace(options=options))
    launched = []
    with emulated_gpu():
        kernel = jit.kernel
        monkeypatch.setattr(jit, "kernel", lambda *args: launched.append(args[1]) or kernel(*args))
        q = case.projection.append(case.x, case.to, "cuda_skinny,torch_linear")
        monkeypatch.undo()
    assert ("project" in launched) is (tokens <= 16)
    assert ("append" in launched) is (tokens > 16 or head_norms)
    if head_norms:
        q *= 1000
        for pages in (case.to.k_pages, case.before[0]):
            pages *= 1000
    case.check(q)
