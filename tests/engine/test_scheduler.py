"""The scheduler and the cache over a memory that checks every key a sequence would read."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import deque
from zlib import crc32

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from strobe.engine.config import EngineConfig
from strobe.engine.kv_cache import KvCache
from strobe.engine.request import Request, Sequence
from strobe.engine.sampling_params import SamplingParams
from strobe.engine.scheduler import Schedule, Scheduler


def next_token(tokens: list[int], index: int) -> int:
    """A stand-in for model and sampler: any token depends on all before it."""
    return crc32(bytes(tokens) + bytes([index])) % 3


def stops(tokens: list[int]) -> bool:
    """A stand-in for an end token, which nobody foresees."""
    return crc32(bytes(tokens[-3:])) % 13 == 0


class Simulation:
    """Runs schedules on a memory of slots. `strict` checks each slot that attention would read.

    `device` has the tokens of every sequence as they were drawn; with `overlap` the scheduler is told of
    them a step late.
    """

    def __init__(
        self,
        config: EngineConfig,
        pages: int,
        *,
        strict: bool = True,
        overlap: bool = False,
        stopping: bool = False,
    ) -> None:
        self.scheduler = Scheduler(config, KvCache(pages, config.page_size, prefix_cache=config.prefix_cache))
        self.config = config
        self.strict = strict
        self.overlap = overlap
        self.stopping = stopping
        self.device: dict[Sequence, list[int]] = {}
        self.launched: deque[tuple[Schedule, list[int]]] = deque()
        self.memory: dict[int, tuple] = {}
        self.requests: list[Request] = []
        self.steps = 0

    def add(self, prompt: list[int], max_tokens: int, n: int = 1, salt: bytes = b"") -> Request:
        request = Request(
            str(len(self.requests)),
            tuple(prompt),
            SamplingParams(max_tokens=max_tokens, n=n),
            cache_salt=salt,
        )
        request.max_output = max_tokens
        request.sequences = [Sequence(request, index, 0, list(prompt)) for index in range(n)]
        self.requests.append(request)
        self.scheduler.add(request)
        return request

    def abort(self, request: Request) -> None:
        for sequence in request.sequences:
            self.scheduler.finish(sequence, "abort")

    def step(self) -> Schedule:
        schedule = self.scheduler.schedule()
        assert schedule.tokens <= self.config.max_num_batched_tokens
        assert len(self.scheduler.running) <= self.config.max_num_seqs
        if schedule.chunks:
            self.run(schedule)
            self.launched.append((schedule, [self.draw(sequence) for sequence in schedule.sampled]))
            self.scheduler.advance(schedule)
        while len(self.launched) > (self.overlap and bool(schedule.chunks)):
            self.accept(*self.launched.popleft())
        self.steps += 1
        return schedule

    def draw(self, sequence: Sequence) -> int:
        tokens = self.device.setdefault(sequence, list(sequence.request.prompt_token_ids))
        tokens.append(next_token(tokens, sequence.index))
        return tokens[-1]

    def accept(self, schedule: Schedule, tokens: list[int]) -> None:
        going = [sequence for sequence in schedule.sampled if sequence.finish_reason is None]
        self.scheduler.accept(schedule, tokens)
        for sequence in going:
            if self.stopping and stops(sequence.tokens):
                self.scheduler.finish(sequence, "stop")
            elif len(sequence.output) == sequence.params.max_tokens:
                self.scheduler.finish(sequence, "length")

    def run(self, schedule: Schedule) -> None:
        if not self.strict:
            return
        page_size = self.config.page_size
        moved = {
            copy.target * page_size + offset: self.memory.get(copy.source * page_size + offset)
            for copy in schedule.copies
            for offset in range(page_size)
        }
        self.memory |= moved
        for sequence, start, end in schedule.chunks:
            for position in range(start, end):
                self.memory[self.slot(sequence, position)] = self.content(sequence, position)
        for sequence, _, end in schedule.chunks:
            assert end <= len(self.tokens(sequence))
            for position in range(end):
                assert self.memory[self.slot(sequence, position)] == self.content(sequence, position)
        for sequence, index in zip(schedule.sampled, schedule.sampled_chunks, strict=True):
            carrier, _, end = schedule.chunks[index]
            assert end == len(self.tokens(carrier)) == len(self.tokens(sequence))

    def tokens(self, sequence: Sequence) -> list[int]:
        return self.device.get(sequence, list(sequence.request.prompt_token_ids))

    def content(self, sequence: Sequence, position: int) -> tuple:
        return sequence.request.cache_salt, crc32(bytes(self.tokens(sequence)[: position + 1])), position

    def slot(self, sequence: Sequence, position: int) -> int:
        page_size = self.config.page_size
        return sequence.pages.pages[position // page_size] * page_size + position % page_size

    def drain(self) -> None:
        while self.scheduler.has_work:
            unread = bool(self.launched)
            assert self.step().chunks or unread, "work, and nothing to run"
        self.scheduler.check()
        assert self.scheduler.cache.used == 0

    def check_outputs(self) -> None:
        """Each finished sequence is what it would be alone."""
        for request in self.requests:
            for sequence in request.sequences:
                tokens = list(request.prompt_token_ids)
                for index in range(len(sequence.output)):
                    assert index == 0 or not (self.stopping and stops(tokens)), "a token too many"
                    tokens.append(next_token(tokens, sequence.index))
                assert sequence.tokens == tokens
                if sequence.finish_reason == "length":
                    assert len(sequence.output) == request.params.max_tokens
                if sequence.finish_reason == "stop":
                    assert stops(tokens)


class SchedulerMachine(RuleBasedStateMachine):
    """Adds, aborts and steps in any order, on caches so small that sequences are preempted."""

    @initialize(
        page_size=st.integers(1, 5),
        extra_pages=st.integers(0, 12),
        seqs=st.integers(2, 6),
        extra_tokens=st.integers(0, 20),
        prefix_cache=st.booleans(),
        overlap=st.booleans(),
        stopping=st.booleans(),
    )
    def begin(self, page_size, extra_pages, seqs, extra_tokens, prefix_cache, overlap, stopping):
        config = EngineConfig(
            page_size=page_size,
            max_num_seqs=seqs,
            max_num_batched_tokens=seqs + extra_tokens,
            prefix_cache=prefix_cache,
        )
        self.simulation = Simulation(
            config, -(-24 // page_size) + extra_pages, overlap=overlap, stopping=stopping
        )

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=16),
        max_tokens=st.integers(1, 8),
        n=st.sampled_from([1, 1, 2]),
        salt=st.sampled_from([b"", b"", b"x"]),
    )
    def add(self, prompt, max_tokens, n, salt):
        self.simulation.add(prompt, max_tokens, n, salt)

    @rule(which=st.integers(0, 1 << 16))
    def abort(self, which):
        if self.simulation.requests:
            self.simulation.abort(self.simulation.requests[which % len(self.simulation.requests)])

    @rule()
    def step(self):
        had_work, unread = self.simulation.scheduler.has_work, bool(self.simulation.launched)
        ran = bool(self.simulation.step().chunks)
        assert ran == had_work or (had_work and unread)

    @invariant()
    def consistent(self):
        if hasattr(self, "simulation"):
            self.simulation.scheduler.check()
            waiting = self.simulation.scheduler.waiting
            assert not any(sequence.computed or sequence.pages.pages for sequence in waiting)

    def teardown(self):
        if hasattr(self, "simulation"):
            self.simulation.drain()
            self.simulation.check_outputs()


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_storm_of_adds_and_aborts(seed, overlap):
    rng = random.Random(seed)
    config = EngineConfig(page_size=4, max_num_seqs=8, max_num_batched_tokens=40)
    simulation = Simulation(config, 16, overlap=overlap, stopping=True)
    for _ in range(400):
        if rng.random() < 0.5:
            prompt = [rng.randrange(2) for _ in range(rng.randint(1, 40))]
            simulation.add(prompt, rng.randint(1, 20), rng.choice([1, 1, 3]))
        if simulation.requests and rng.random() < 0.2:
            simulation.abort(rng.choice(simulation.requests))
        simulation.step()
        simulation.scheduler.check()
    simulation.drain()
    simulation.check_outputs()
    assert simulation.scheduler.preemptions > 0
    assert simulation.scheduler.prefix_hits > 0


@pytest.mark.parametrize("overlap", [False, True])
def test_nothing_leaks_over_ten_thousand_requests(overlap):
    rng = random.Random(11)
    config = EngineConfig(page_size=16, max_num_seqs=64, max_num_batched_tokens=512)
    simulation = Simulation(config, 90, strict=False, overlap=overlap, stopping=True)
    done = 0
    while done < 10_000:
        for _ in range(rng.randint(0, 8)):
            prompt = [rng.randrange(40)] * rng.randint(1, 90)
            simulation.add(prompt, rng.randint(1, 12), rng.choice([1, 1, 1, 2]))
        if simulation.requests and rng.random() < 0.3:
            simulation.abort(rng.choice(simulation.requests))
        simulation.step()
        finished = [request for request in simulation.requests if request.finished]
        done += len(finished)
        simulation.requests = [request for request in simulation.requests if not request.finished]
        for sequence in (sequence for request in finished for sequence in request.sequences):
            simulation.device.pop(sequence, None)
    simulation.drain()
    cache = simulation.scheduler.cache
    assert cache.available == cache.num_pages
    assert len(cache._hash_of) <= cache.num_pages
    assert simulation.scheduler.preemptions > 0


def test_first_come_first_served():
    simulation = Simulation(EngineConfig(page_size=4, max_num_seqs=2, max_num_batched_tokens=8), 64)
    requests = [simulation.add([index] * 5, 3) for index in range(6)]
    order = []
    while simulation.scheduler.has_work:
        simulation.step()
        order += [r for r in requests if r.finished and r not in order]
    assert order == requests


def test_long_prompts_go_in_chunks_beside_those_that_decode():
    simulation = Simulation(EngineConfig(page_size=4, max_num_seqs=4, max_num_batched_tokens=10), 64)
    simulation.add([1, 2], 20)
    simulation.step()
    simulation.add([0] * 30, 2)
    sizes = [[chunk.end - chunk.start for chunk in simulation.step().chunks] for _ in range(4)]
    assert sizes == [[1, 9], [1, 9], [1, 9], [1, 3]]


def test_rows_of_one_token_stand_ahead_of_prompts():
    simulation = Simulation(EngineConfig(page_size=4, max_num_seqs=4, max_num_batched_tokens=10), 64)
    for length in (12, 1, 15):
        simulation.add([length] * length, 9)
    sizes = [[chunk.end - chunk.start for chunk in simulation.step().chunks] for _ in range(3)]
    assert sizes == [[10], [1, 2, 7], [1, 1, 8]]


def test_a_preempted_sequence_goes_first_again():
    simulation = Simulation(EngineConfig(page_size=4, max_num_seqs=2, max_num_batched_tokens=64), 6)
    first, second, third = (simulation.add([index] * 8, 12) for index in range(3))
    while not simulation.scheduler.preemptions:
        simulation.step()
    assert [sequence.request for sequence in simulation.scheduler.waiting] == [second, third]
    simulation.drain()
    simulation.check_outputs()
    assert first.sequences[0].preemptions == 0, "the earliest never gives way"


def test_siblings_share_their_prompt():
    simulation = Simulation(EngineConfig(page_size=4, max_num_seqs=4, max_num_batched_tokens=64), 16)
    request = simulation.add([7] * 10, 4, n=3)
    schedule = simulation.step()
    assert schedule.tokens == 10, "the prompt runs once"
    assert schedule.sampled == tuple(request.sequences)
    tables = [list(sequence.pages.pages) for sequence in request.sequences]
    assert tables[0] == tables[1] == tables[2]
    schedule = simulation.step()
    assert len(schedule.copies) == 2, "all but the last writer copy the page that is not full"
    assert len({sequence.pages.pages[2] for sequence in request.sequences}) == 3
    assert len({sequence.pages.pages[1] for sequence in request.sequences}) == 1
    simulation.drain()


def test_scheduler_and_cache_import_no_torch():
    code = "import sys, strobe.engine.scheduler, strobe.engine.request; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
