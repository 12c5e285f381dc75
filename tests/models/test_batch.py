"""The cache's tensors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from strobe.models import shapes
from strobe.models.batch import KvTensors

CONFIG = replace(shapes.named("llama3.2-1b"), layers=3)


@pytest.mark.parametrize("pages", [1, 131, 2049])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_cache_is_zeroed_contiguous_and_of_the_shape_asked_for(device: str, pages: int) -> None:
    cache = KvTensors.allocate(CONFIG, pages, 16, dtype=torch.bfloat16, device=device)
    for x in (cache.k, cache.v):
        assert x.shape == (3, pages, 16, 8, 64)
        assert x.dtype == torch.bfloat16
        assert x.is_contiguous()
        if device == "cpu":
            assert not x.any()
    assert len(cache.layers) == 3
    assert cache.layers[2][1].data_ptr() == cache.v[2].data_ptr()


def test_a_devices_allocator_has_nothing_left_over_to_give_to_others() -> None:
    cache = KvTensors.allocate(CONFIG, 2049, 16, dtype=torch.bfloat16, device="meta")
    assert cache.k.untyped_storage().nbytes() % (2 << 20) == 0 < cache.k.nbytes % (2 << 20)
