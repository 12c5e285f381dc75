"""Padding, the choice of a size, and what a replay reads: on a CPU, with recordings in place of graphs."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from strobe.engine import inputs, runner
from strobe.engine.config import EngineConfig
from strobe.engine.engine import Engine
from strobe.engine.graphs import StepGraphs, decode_sizes
from strobe.engine.inputs import inputs_of, padded, padded_prompt, table_width
from strobe.engine.request import Request, Sequence
from strobe.engine.sampling_params import SamplingParams
from strobe.engine.scheduler import Chunk, Schedule
from strobe.errors import DeviceError

GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)


class Recorded:
    """Runs the first work of a size again, into one tensor. What lies in it between runs is no answer."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def record(self, work):
        self.recorded += 1
        static = torch.full_like(work(), float("nan"))

        def replay() -> None:
            self.replayed += 1
            static.copy_(work())

        return static, replay


@pytest.mark.parametrize(
    ("rows", "sizes"),
    [
        (1, (1,)),
        (2, (1, 2)),
        (3, (1, 2, 3)),
        (8, (1, 2, 4, 8)),
        (20, (1, 2, 4, 8, 16, 20)),
        (32, (1, 2, 4, 8, 16, 24, 32)),
        (300, (1, 2, 4, *range(8, 64, 8), *range(64, 289, 16), 300)),
    ],
)
def test_sizes(rows, sizes):
    assert decode_sizes(rows) == sizes


@pytest.mark.parametrize("most", [1, 2, 5, 9, 64, 256, 511, 512, 513, 4096])
def test_every_number_of_rows_has_the_smallest_size_that_holds_it(most):
    graphs = StepGraphs(decode_sizes(most), Recorded())
    assert list(graphs.sizes) == sorted(set(graphs.sizes))
    for rows in range(1, most + 1):
        size = graphs.size_for(rows)
        fitting = [size for size in graphs.sizes if size >= rows]
        assert size == (min(fitting) if fitting else None)
        assert size is not None or rows > 512


def test_a_size_runs_eagerly_once_and_is_recorded_once():
    recorder = Recorded()
    graphs = StepGraphs(decode_sizes(8), recorder)
    value = torch.zeros(3)
    for step in range(4):
        value.fill_(step)
        assert graphs.run(4, 64, lambda: value + 1).tolist() == [step + 1] * 3
        assert (recorder.recorded, recorder.replayed) == (1, step)
    graphs.run(8, 64, lambda: value)
    graphs.run(4, 256, lambda: value)
    assert graphs.captured == 3


@pytest.mark.parametrize("error", [RuntimeError("operation not permitted\nwhere"), DeviceError("no launch")])
def test_what_cannot_be_recorded_runs_eagerly_from_then_on(error, caplog):
    class Refusing(Recorded):
        def record(self, work):
            work()
            raise error

    graphs = StepGraphs(decode_sizes(8), Refusing())
    assert graphs.run(graphs.size_for(3), 64, lambda: torch.ones(4)).tolist() == [1] * 4
    assert [graphs.size_for(rows) for rows in (1, 3, 8)] == [None] * 3
    (record,) = caplog.records
    assert record.message.endswith(str(error).partition("\n")[0])


def test_what_fails_in_itself_is_not_taken_for_a_refusal():
    def failing():
        raise RuntimeError("not finite")

    graphs = StepGraphs(decode_sizes(8), Recorded())
    with pytest.raises(RuntimeError, match="not finite"):
        graphs.run(4, 64, failing)
    assert graphs.size_for(4) == 4


def decoding(lengths: list[int], page_size: int, rng: random.Random) -> Schedule:
    """A step of one token a row; some rows' tokens are unread."""
    sequences = []
    for row, length in enumerate(lengths):
        unread = rng.random() < 0.5
        tokens = [rng.randrange(1, 256) for _ in range(length - unread)]
        sequence = Sequence(Request(str(row), (1,), GREEDY), 0, 0, tokens, unread=int(unread), row=row)
        sequence.pages.pages.extend(rng.randrange(1000) for _ in range(-(-length // page_size)))
        sequences.append(sequence)
    chunks = tuple(Chunk(s, n - 1, n) for s, n in zip(sequences, lengths, strict=True))
    return Schedule(chunks, tuple(sequences), tuple(range(len(chunks))), ())


@pytest.mark.parametrize("rows", [12, 80])
@pytest.mark.parametrize("seed", range(3))
def test_padding_adds_rows_that_are_nobodys(seed, rows):
    rng = random.Random(seed)
    page_size, first_word, nobody = 4, 50, 1000
    lengths = [rng.randint(1, 700) for _ in range(rng.randint(1, 9) if rows == 12 else rng.randint(20, 80))]
    schedule = decoding(lengths, page_size, rng)
    plain, count = inputs_of(schedule, page_size, first_word), len(lengths)
    wide = padded(plain, rows, page_size, first_word, nobody)
    if rows == 12:
        assert wide.logits_at is None
        at = np.arange(count)
    else:
        at = wide.logits_at[:count]
        between = np.diff([-1, *at, rows]) - 1
        assert len(wide.logits_at) == rows
        assert 0 <= between.min() <= between.max() <= -(-rows // count)
    assert wide.page_table.shape == (rows, table_width(-(-max(lengths) // page_size)))
    for name in ("positions", "slots", "seq_lens"):
        given, more = getattr(plain, name), getattr(wide, name)
        assert more.dtype == given.dtype
        np.testing.assert_array_equal(more[at], given)
    np.testing.assert_array_equal(wide.page_table[at, : plain.page_table.shape[1]], plain.page_table)
    for row, sequence in zip(at, schedule.sampled, strict=True):
        known = sequence.unread == 0
        assert wide.picks[row] == (first_word + sequence.row if known else sequence.row)
        assert wide.token_ids[sequence.row] == (sequence.tokens[-1] if known else 0)
    for row in set(range(rows)) - set(at.tolist()):
        assert wide.seq_lens[row] == 1
        assert wide.positions[row] == 0
        assert wide.slots[row] == nobody * page_size
        assert wide.page_table[row, 0] == nobody
        assert wide.token_ids[wide.picks[row] - first_word] == 0
    assert wide.max_kv_len >= plain.max_kv_len
    assert plain.logits_at is None


@pytest.mark.parametrize("computed", [0, 5])
def test_padding_a_prompt_adds_tokens_of_no_row(computed):
    page_size, nobody, length = 4, 1000, 23
    sequence = Sequence(Request("0", tuple(range(1, length + 1)), GREEDY), 0, 0, list(range(1, length + 1)))
    sequence.pages.pages.extend(range(40, 46))
    chunk = Chunk(sequence, computed, length)
    plain = inputs_of(Schedule((chunk,), (sequence,), (0,), ()), page_size, 50)
    wide, count = padded_prompt(plain, 64, page_size, nobody), length - computed
    for name, more in (("token_ids", 0), ("positions", 0), ("slots", nobody * page_size)):
        given, padding = np.split(getattr(wide, name), [count])
        np.testing.assert_array_equal(given, getattr(plain, name))
        assert padding.tolist() == [more] * (64 - count)
    assert wide.cu_seqlens.tolist() == [0, count]
    assert (wide.logits_at.tolist(), wide.seq_lens.tolist()) == ([count - 1], [length])
    np.testing.assert_array_equal(wide.page_table[:, :6], plain.page_table)
    assert (wide.max_q_len, wide.page_table.shape) == (64, (1, table_width(6)))


def test_rows_of_one_token_are_told_from_prompts():
    def chunk(first_page: int, start: int, end: int) -> Chunk:
        sequence = Sequence(Request("0", (5,) * end, GREEDY), 0, 0, [5] * end)
        sequence.pages.pages.extend(range(first_page, first_page + 6))
        return Chunk(sequence, start, end)

    def told(*chunks: Chunk) -> tuple[int, list[int] | None]:
        sequences = tuple(each.sequence for each in chunks)
        inputs = inputs_of(Schedule(chunks, sequences, tuple(range(len(chunks))), ()), 4, 50)
        return inputs.decoding, None if inputs.cu_seqlens is None else inputs.cu_seqlens.tolist()

    one, other, prompt, rest = chunk(0, 8, 9), chunk(6, 0, 1), chunk(12, 0, 7), chunk(18, 3, 5)
    assert told(one, other) == (0, None)
    assert told(one, other, prompt, rest) == (2, [0, 7, 9])
    assert told(one, prompt) == (1, [0, 7])
    assert told(prompt, rest) == (0, [0, 7, 9])
    assert told(prompt) == (0, None)


def test_few_widths():
    assert {table_width(pages) for pages in range(1, 8193)} == {64, 256, 1024, 4096, 16384}
    assert all(table_width(pages) >= pages for pages in range(1, 5000))


@pytest.mark.parametrize("spread", [3, 64])
def test_replayed_steps_give_the_tokens_of_eager_ones(checkpoint, monkeypatch, spread):
    monkeypatch.setattr(inputs, "_SPREAD", spread)
    recorder = Recorded()
    monkeypatch.setattr(runner, "recorder_for", lambda device: recorder)
    config = EngineConfig(kv_cache_pages=60, page_size=2, max_num_seqs=7)
    rng = random.Random(3)
    lengths = [30, *(rng.randint(1, 30) for _ in range(19))]
    prompts = [tuple(rng.randrange(256) for _ in range(length)) for length in lengths]
    answers = []
    for graphs in (False, True):
        engine = Engine(checkpoint.model, None, replace(config, graphs=graphs, overlap=graphs))
        requests = [
            Request(str(i), p, replace(GREEDY, max_tokens=4 + i % 9, logprobs=1 if i % 3 == 0 else None))
            for i, p in enumerate(prompts)
        ]
        for index, request in enumerate(requests):
            engine.add(request)
            if index % 4 == 0:
                engine.step()
        while engine.has_work:
            engine.step()
        engine.scheduler.check()
        answers.append([request.output().token_ids for request in requests])
    assert answers[0] == answers[1]
    prompts_alone = engine.runner.prompt_graphs.captured
    assert prompts_alone == 1
    assert recorder.recorded == engine.runner.graphs.captured + prompts_alone
    assert recorder.replayed > 10


def test_without_a_device_that_records_steps_run_eagerly(checkpoint):
    engine = Engine(checkpoint.model, None, EngineConfig(kv_cache_pages=8, graphs=True))
    assert engine.runner.graphs is None
