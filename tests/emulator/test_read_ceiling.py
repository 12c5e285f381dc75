"""The kernel that measures the read ceiling reads every piece, also where the last round is not full."""

from __future__ import annotations

import pytest
import torch
from cuda_emulator import emulated_gpu, missing

from strobe.bench import read

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.mark.parametrize("pieces", [1, 37, 200])
def test_every_piece_is_read(pieces: int) -> None:
    data = torch.randint(-(2**31), 2**31 - 1, (pieces * read.PIECE // 4,), dtype=torch.int32)
    total = torch.zeros(1, dtype=torch.int32)
    with emulated_gpu(sm_count=9):
        read.read_once(data, total)
    assert int(total) == read.first_words(data)
