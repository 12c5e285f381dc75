"""What the Hopper rung's prepared launches hand to the driver, written down by a kernel that does no more."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from strobe.attention.inputs import describe
from strobe.attention.prefill import cuda_hopper
from strobe.attention.prefill import cuda_hopper_launch as launching
from strobe.attention.problem import Options, Paged
from strobe.cuda import jit


class Recorder:
    """Stands for a Kernel: keeps each launch's map addresses and its params."""

    device = 0

    def __init__(self) -> None:
        self.launches: list[tuple[list[int], launching.Params]] = []
        self.prepared = self.packed = 0

    def prepare(self, args: list[Any], **shape: Any) -> SimpleNamespace:
        self.prepared += 1
        return SimpleNamespace(like=self.like)

    def like(self, args: list[Any]) -> SimpleNamespace:
        self.packed += 1
        maps, params = [ctypes.addressof(each) for each in args[:3]], args[3]
        return SimpleNamespace(on=lambda stream: self.launches.append((maps, params)))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    found = Recorder()
    monkeypatch.setattr(jit, "kernel", lambda *_: found)
    monkeypatch.setattr(cuda_hopper, "gpu", lambda _: SimpleNamespace(sm_count=132))
    monkeypatch.setattr(launching, "counters", lambda _: {7: 70})
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 7, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: False, raising=False)
    return found


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """Where each tensor map stands, by the address it was made for."""
    made: dict[int, int] = {}
    kept = []

    def tensor_map(address: int, *_: Any, **__: Any) -> jit.TensorMap:
        assert address not in made, "encoded twice"
        kept.append(jit.TensorMap())
        made[address] = ctypes.addressof(kept[-1])
        return kept[-1]

    monkeypatch.setattr(jit, "tensor_map", tensor_map)
    return made


def qkv(kv_len: int = 40) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q = torch.randn(2, 30, 4, 64).bfloat16()
    k, v = torch.randn(2, 2, kv_len, 2, 64).bfloat16()
    return q, k, v


def test_maps_are_encoded_for_new_addresses_only(recorder: Recorder, encoded: dict[int, int]) -> None:
    layers = [qkv() for _ in range(3)]
    problem = describe(*layers[0], Options(causal=True, return_lse=True))
    call = cuda_hopper.prepare(problem, *layers[0])
    out, lse = torch.empty_like(layers[0][0]), torch.empty(2, 4, 30)
    for _ in range(4):
        for q, k, v in layers:
            call(q, k, v, out, lse)
            maps, params = recorder.launches[-1]
            assert maps == [encoded[x.data_ptr()] for x in (q, k, v)]
            assert (params.out, params.lse) == (out.data_ptr(), lse.data_ptr())
            strides = params.out_batch_stride, params.out_row_stride, params.out_head_stride
            assert strides == out.stride()[:3]
            assert (params.lse_batch_stride, params.lse_head_stride) == lse.stride()[:2]
    assert (recorder.prepared, recorder.packed) == (1, len(layers))
    call(*layers[0], out, None)
    assert recorder.launches[-1][1].lse is None


def test_what_is_prepared_is_what_runs(recorder: Recorder, encoded: dict[int, int]) -> None:
    """`prepare` guesses the strides of out and lse; `run` reads them."""
    sums = torch.tensor([0, 3, 30], dtype=torch.int32)
    pages = Paged(torch.zeros(2, 1, dtype=torch.int32), torch.tensor([5, 40], dtype=torch.int32), sums)
    q, k, v = qkv()
    packed_lse = torch.empty(4, 30)
    for tensors, options, lse in (
        ((q, k, v), Options(), torch.empty(2, 4, 30)),
        ((q[0], k, v), Options(layout=pages), packed_lse),
    ):
        problem, out = describe(*tensors, options), torch.empty_like(tensors[0])
        cuda_hopper.prepare(problem, *tensors)(*tensors, out, lse)
        encoded.clear()
        cuda_hopper.run(problem, *tensors, out, lse)
        encoded.clear()
        prepared, ran = (bytes(params) for _, params in recorder.launches[-2:])
        assert prepared == ran


@pytest.mark.parametrize("which", [0, 1, 2])
def test_an_address_off_sixteen_bytes_is_copied(
    which: int, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    monkeypatch.setattr(jit, "tensor_map", lambda at, *_, **__: encoded.append(at) or jit.TensorMap())
    tensors = list(qkv())
    call = cuda_hopper.prepare(describe(*tensors, Options()), *tensors)
    store = torch.empty(tensors[which].numel() + 1, dtype=torch.bfloat16)
    tensors[which] = store[1:].view_as(tensors[which])
    assert tensors[which].data_ptr() % 16
    for _ in range(2):
        call(*tensors, torch.empty_like(tensors[0]), None)
    assert tensors[which].data_ptr() not in encoded
    assert len(recorder.launches) == 2


def test_no_keys_need_no_map_of_their_own(recorder: Recorder, encoded: dict[int, int]) -> None:
    q, k, v = qkv(kv_len=0)
    cuda_hopper.prepare(describe(q, k, v, Options()), q, k, v)(q, k, v, torch.empty_like(q), None)
    assert list(encoded) == [q.data_ptr()]


def test_sinks_that_must_be_converted_are_converted_each_time(
    recorder: Recorder, encoded: dict[int, int]
) -> None:
    q, k, v = qkv()
    sinks = torch.randn(4).bfloat16()
    problem = describe(q, k, v, Options(sinks=sinks))
    call = cuda_hopper.prepare(problem, q, k, v)
    for _ in range(2):
        before = recorder.prepared
        call(q, k, v, torch.empty_like(q), None)
        encoded.clear()
        assert recorder.prepared == before + 1
        assert recorder.launches[-1][1].sinks not in (None, sinks.data_ptr())


def test_a_stream_s_launches_are_its_own(
    recorder: Recorder, encoded: dict[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streams draw tiles from counters of their own; each captured launch has one for itself."""
    tensors = qkv()
    out, captured = torch.empty_like(tensors[0]), iter(range(100, 200))
    now = SimpleNamespace(stream=0, capturing=False)

    class Counters(dict[int, int]):
        def captured(self) -> int:
            return next(captured)

    monkeypatch.setattr(launching, "counters", lambda _: Counters({0: 1, 7: 70, 8: 80}))
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: now.stream)
    monkeypatch.setattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: now.capturing)
    call = cuda_hopper.prepare(describe(*tensors, Options()), *tensors)
    for now.stream, now.capturing in ((0, False), (7, False), (8, True), (8, True), (8, False), (7, False)):
        call(*tensors, out, None)
    assert [params.next_tile for _, params in recorder.launches] == [1, 70, 100, 101, 80, 70]


def test_launches_are_bounded(
    recorder: Recorder, encoded: dict[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching.Launch, "MOST", 3)
    tensors = qkv()
    call = cuda_hopper.prepare(describe(*tensors, Options()), *tensors)
    outs = [torch.empty_like(tensors[0]) for _ in range(8)]
    for out in (*outs, *outs[::-1]):
        for _ in range(2):
            call(*tensors, out, None)
            assert recorder.launches[-1][1].out == out.data_ptr()
    assert len(outs) < recorder.packed <= 2 * len(outs)


def test_maps_are_bounded(encoded: dict[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching.Maps, "MOST", 5)
    q = qkv()[0]
    maps = launching.Maps(q.dtype, q.shape, q.stride(), launching.ROWS)
    for address in range(16, 16 * 20, 16):
        for _ in range(2):
            assert ctypes.addressof(maps[address]) == encoded[address]
        assert len(maps) <= 5


class TestCounters:
    @pytest.fixture
    def counters(self, monkeypatch: pytest.MonkeyPatch) -> launching.Counters:
        def zeros(self: launching.Counters, count: int) -> torch.Tensor:
            return torch.zeros(count, self.BYTES_APART // 4, dtype=torch.int32)

        def add(self: launching.Counters) -> None:
            self._slabs.append(self._zeros(self.COUNT))
            start, size = self._slabs[-1].data_ptr(), self._slabs[-1].nbytes
            self._free += range(start, start + size, self.BYTES_APART)

        monkeypatch.setattr(launching.Counters, "COUNT", 8)
        monkeypatch.setattr(launching.Counters, "_zeros", zeros)
        monkeypatch.setattr(launching.Counters, "_add", add)
        return launching.Counters(0)

    def test_a_stream_keeps_its_own(self, counters: launching.Counters) -> None:
        found = {stream: counters[stream] for stream in range(20)}
        assert len(set(found.values())) == 20
        assert all(counters[stream] == address for stream, address in found.items())

    def test_captured_launches_share_with_nobody(self, counters: launching.Counters) -> None:
        eager = counters[0]
        taken = [counters.captured() for _ in range(7)]
        assert len({eager, *taken}) == 8
        assert not counters._free
        counters.captured()  # zeroed in the graph
        assert not counters._free
