"""Peers are called as they mean to be called."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from strobe.attention.cases import decode_shape
from strobe.bench.peers import PEERS


def test_fa3_makes_its_schedule_once_a_layout() -> None:
    """For each of its two caches: pages, and the same keys and values one after another."""
    scheduled: list[Any] = []
    taken: list[Any] = []

    def schedule(*sizes: Any, page_size: int | None, is_causal: bool) -> object:
        scheduled.append((*sizes[:7], page_size, is_causal))
        return object()

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> tuple[torch.Tensor]:
        taken.append(options["scheduler_metadata"])
        return (q,)

    library = SimpleNamespace(fwd=forward, get_scheduler_metadata=schedule)
    inputs = decode_shape(2, 100, 4, 2, 32, page_size=16).inputs(torch.bfloat16, "cpu")
    calls = [PEERS[name].make(library, inputs) for name in ("fa3", "fa3_contiguous") for _ in range(2)]
    for call in calls + calls:
        call()
    sizes = (4, 2, 32, 32)
    assert scheduled == [(2, 1, 128, *sizes, 16, True), (2, 1, 112, *sizes, None, True)]
    assert taken[:4] == taken[4:]
    assert (taken[0], taken[2]) == (taken[1], taken[3])
    assert taken[0] is not taken[2]
