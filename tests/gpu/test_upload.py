"""Weights onto a GPU: every element arrives, also through more pieces than there are buffers."""

from __future__ import annotations

import pytest
import torch

from strobe.checkpoints import upload

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 7), (33, 1001), (70_001,), (4099, 517)])
def test_every_element_arrives(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(upload, "PIECE_BYTES", 1 << 16)
    sources = [torch.randn(shape) for _ in range(5)]
    places = [torch.empty(shape, dtype=dtype, device="cuda") for _ in sources]
    with upload.copying("cuda") as copy:
        for to, source in zip(places, sources, strict=True):
            copy(to, source)
    for to, source in zip(places, sources, strict=True):
        assert torch.equal(to.cpu(), source.to(dtype))


def test_a_transposed_place_and_a_row_longer_than_a_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "PIECE_BYTES", 1 << 12)
    for to in (torch.empty(300, 257, device="cuda").t(), torch.empty(3, 5000, device="cuda")):
        source = torch.randn(to.shape)
        with upload.copying("cuda") as copy:
            copy(to, source)
        assert torch.equal(to.cpu(), source)
