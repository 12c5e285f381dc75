"""Arrays reach the device whole, and no host buffer is written while a copy may read it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strobe.engine.transfer import BUFFERS, Readback, Staging, nbytes

CPU = torch.device("cpu")

arrays = st.lists(
    st.tuples(st.sampled_from(["int32", "int64"]), st.lists(st.integers(0, 5), min_size=1, max_size=2)),
    min_size=1,
    max_size=6,
)


@given(kinds=arrays, seed=st.integers(0, 99))
@settings(deadline=None)
def test_arrays_arrive_as_they_were_and_lie_where_they_lay(kinds, seed):
    rng = np.random.default_rng(seed)
    capacity = nbytes([(int(np.prod(shape)), np.dtype(dtype).itemsize) for dtype, shape in kinds])
    staging = Staging(CPU, head=3, capacity=capacity)
    staging.drawn.copy_(torch.tensor([7, 8, 9]))
    places = set()
    for _ in range(BUFFERS + 2):
        sent = [rng.integers(0, 1 << 30, shape).astype(dtype) for dtype, shape in kinds]
        found = staging.send(sent)
        places.add(tuple(tensor.data_ptr() for tensor in found))
        for array, tensor in zip(sent, found, strict=True):
            assert tensor.dtype == getattr(torch, str(array.dtype))
            assert tensor.data_ptr() % 16 == 0 or not tensor.numel()
            np.testing.assert_array_equal(tensor.numpy(), array)
        assert staging.drawn.tolist() == [7, 8, 9]
    assert len(places) == 1


def test_token_ids_and_drawn_tokens_are_picked_at_once():
    staging = Staging(CPU, head=4, capacity=64)
    staging.drawn.copy_(torch.tensor([40, 41, 42, 43]))
    first = staging.first_word
    _, picks = staging.send([np.array([10, 0, 12]), np.array([first, 2, first + 2])])
    assert staging.words.index_select(0, picks).tolist() == [10, 42, 12]


def test_more_than_there_is_room_for_is_refused():
    staging = Staging(CPU, head=1, capacity=32)
    with pytest.raises(ValueError, match="broadcast"):
        staging.send([np.zeros(5, np.int64)])


class Copying:
    """An event of a device whose copies take place only when somebody waits for them."""

    log: list[tuple[str, int]]

    def __init__(self, log: list[tuple[str, int]], name: int) -> None:
        self.log, self.name = log, name

    def record(self) -> None:
        self.log.append(("copied", self.name))

    def synchronize(self) -> None:
        self.log.append(("waited", self.name))


def test_a_host_buffer_is_waited_for_before_it_is_written_again():
    log: list[tuple[str, int]] = []
    names = iter(range(BUFFERS))
    staging = Staging(CPU, head=1, capacity=16, new_event=lambda device: Copying(log, next(names)))
    for value in range(2 * BUFFERS):
        staging.send([np.array([value])])
    turns = [*range(BUFFERS)] * 2
    assert log == [(what, turn) for turn in turns for what in ("waited", "copied")]


def test_what_is_read_back_is_what_it_was_when_it_was_asked_for():
    tensor = torch.arange(5)
    readback = Readback(CPU)
    copy = readback.copy(tensor[1:4])
    readback.sent()
    tensor.zero_()
    readback.wait()
    assert copy.tolist() == [1, 2, 3]
