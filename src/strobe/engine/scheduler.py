"""Which tokens of which sequences run next: continuous batching, first come first served.

Running sequences come first, each with the tokens it has not yet computed: one where it decodes, a
chunk of its prompt where it prefills. What is left of the step's token budget admits waiting ones.
When pages run out the latest arrival gives its pages back and waits, to be recomputed later.

A step may be scheduled while the one before it still runs: `advance` says that a step was launched,
`accept` what it drew. In between a sequence has a token more than the host knows, whose place in the
cache can be planned all the same. Pages may change hands meanwhile: the device runs steps in order.

This module imports no torch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from strobe.engine.config import EngineConfig
from strobe.engine.kv_cache import KvCache, PageCopy
from strobe.engine.request import FinishReason, Request, Sequence


class Chunk(NamedTuple):
    """Tokens `[start, end)` of a sequence, to be run in one step."""

    sequence: Sequence
    start: int
    end: int


@dataclass(frozen=True)
class Schedule:
    """One step: page copies first, then one forward pass over the chunks, then a draw for `sampled`.

    `sampled` are the sequences that get a token, and `sampled_chunks[i]` is the chunk whose last
    token's logits `sampled[i]` draws from: a prompt's first logits serve all its siblings. Of the
    chunks `scored` every token's logits are wanted, after those.
    """

    chunks: tuple[Chunk, ...]
    sampled: tuple[Sequence, ...]
    sampled_chunks: tuple[int, ...]
    copies: tuple[PageCopy, ...]
    scored: tuple[int, ...] = ()

    @cached_property
    def tokens(self) -> int:
        return sum(chunk.end - chunk.start for chunk in self.chunks)

    @cached_property
    def decodes(self) -> bool:
        """True where each row brings one token and draws one."""
        rows = len(self.chunks)
        return self.tokens == rows and self.sampled_chunks == tuple(range(rows)) and not self.scored


class Scheduler:
    """The queue, the running sequences and their pages."""

    def __init__(self, config: EngineConfig, cache: KvCache) -> None:
        self.config = config
        self.cache = cache
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        """Prompt tokens looked up in the prefix cache, and found there."""

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        """Queue a request whose sequences are made; its first one carries the others through the prompt."""
        first, *siblings = request.sequences
        first.siblings = siblings
        self.waiting.append(first)

    def schedule(self) -> Schedule:
        """The next step. Pages are taken here; nothing else changes until `advance`."""
        chunks: list[Chunk] = []
        copies: list[PageCopy] = []
        if not self.config.deterministic or not self._prefill_alone(chunks, copies):
            budget = self._continue(self.config.step_tokens, chunks, copies)
            if budget is not None and not self.config.deterministic:
                self._admit(budget, chunks, copies)
        chunks.sort(key=lambda chunk: chunk.end - chunk.start > 1)  # rows that decode ahead of prompts
        sampled, sampled_chunks = [], []
        for index, (sequence, _, end) in enumerate(chunks):
            if end == sequence.length:  # its last token's logits give the next
                sampled += [sequence, *sequence.siblings]
                sampled_chunks += [index] * (1 + len(sequence.siblings))
        scored = [i for i, (s, start, _) in enumerate(chunks) if s.scores_prompt and start < s.prompt_len - 1]
        return Schedule(tuple(chunks), tuple(sampled), tuple(sampled_chunks), tuple(copies), tuple(scored))

    def advance(self, schedule: Schedule) -> None:
        """A step was launched: the device will have computed its chunks and drawn its tokens."""
        for sequence, _, end in schedule.chunks:
            if sequence.finish_reason is not None:  # by the step before, which was read meanwhile
                continue
            sequence.computed = end
            self._commit(sequence)
            if sequence.siblings and sequence.computed == sequence.length:
                self._fork(sequence)
        for row, sequence in enumerate(schedule.sampled):
            sequence.unread, sequence.row = sequence.unread + 1, row

    def accept(self, schedule: Schedule, tokens: Iterable[int]) -> None:
        """Read a step's draw: `tokens[i]` for `schedule.sampled[i]`, dropped where that is over."""
        for sequence, token in zip(schedule.sampled, tokens, strict=True):
            sequence.unread -= 1
            if sequence.finish_reason is None:
                sequence.tokens.append(token)
                self._commit(sequence)

    def forget(self, schedule: Schedule) -> None:
        """The tokens of a launched step are lost: those that go on will draw them again."""
        for sequence in schedule.sampled:
            sequence.unread -= 1

    def finish(self, sequence: Sequence, reason: FinishReason, stop_reason: str | int | None = None) -> None:
        """End a sequence, wherever it stands, and free its pages."""
        if sequence.finish_reason is not None:
            return
        sequence.finish_reason, sequence.stop_reason = reason, stop_reason
        if sequence in self.running:
            self.running.remove(sequence)
            self.cache.release(sequence.pages)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def forget_prefixes(self) -> None:
        """Empty the prefix cache, and count its hits anew."""
        self.cache.clear()
        self.prefix_queries = self.prefix_hits = 0

    def check(self) -> None:
        """Raise StrobeError where a page is lost, shared wrongly, or held by nobody."""
        self.cache.check(sequence.pages for sequence in self.running)

    def _commit(self, sequence: Sequence) -> None:
        """Make findable the pages whose tokens are known, and computed or about to be: whoever finds them
        reads them in a later step. A token that is dropped later was never computed."""
        self.cache.commit(sequence.pages, sequence.tokens, min(sequence.computed, len(sequence.tokens)))

    def _continue(self, budget: int, chunks: list[Chunk], copies: list[PageCopy]) -> int | None:
        """Chunks of the running sequences; the budget that is left, or None where some had to be left out."""
        index = 0
        while index < len(self.running):
            sequence = self.running[index]
            index += 1
            if sequence.output_len >= sequence.request.max_output:
                continue  # its last token is drawn, and waits to be read
            if not budget:
                return None
            start, end = sequence.computed, min(sequence.length, sequence.computed + budget)
            if self.cache.missing(sequence.pages, start, end) and not self._grow(sequence, end, copies):
                return None
            chunks.append(Chunk(sequence, start, end))
            budget -= end - start
        return budget

    def _prefill_alone(self, chunks: list[Chunk], copies: list[PageCopy]) -> bool:
        """For `deterministic`: the next chunk of the first prompt that is not run yet, if there is one."""
        budget = self.config.step_tokens
        for sequence in self.running:
            start, end = sequence.computed, min(sequence.prompt_len, sequence.computed + budget)
            if start < end:
                self._grow(sequence, end, copies)
                chunks.append(Chunk(sequence, start, end))
                return True
        self._admit(budget, chunks, copies)
        return bool(chunks)

    def _can_stay(self, request: Request) -> bool:
        """Whether pages will last to its end, and to the end of all that run, so that none is preempted."""
        running = dict.fromkeys(sequence.request for sequence in self.running)
        needed = (
            self.cache.most_pages(len(r.prompt_token_ids), r.max_output, r.params.n)
            for r in (request, *running)
        )
        return sum(needed) <= self.cache.num_pages

    def _admit(self, budget: int, chunks: list[Chunk], copies: list[PageCopy]) -> None:
        seats = self.config.max_num_seqs - sum(1 + len(sequence.siblings) for sequence in self.running)
        while self.waiting and budget:
            sequence = self.waiting[0]
            if sequence.unread or 1 + len(sequence.siblings) > seats:
                return
            if self.config.deterministic and (chunks or not self._can_stay(sequence.request)):
                return
            if sequence.prefix is None:
                known = () if sequence.scores_prompt else sequence.tokens
                sequence.prefix = self.cache.prefix(known, sequence.request.cache_salt)
            pages = self.cache.acquire(sequence.prefix)
            computed = len(pages.pages) * self.cache.page_size
            if self.cache.missing(pages, computed, len(sequence.tokens)) > self.cache.available:
                self.cache.release(pages)
                return
            self.waiting.popleft()
            self.running.append(sequence)
            sequence.pages, sequence.prefix, sequence.computed = pages, None, computed
            if sequence.cached_tokens is None:
                sequence.cached_tokens = computed
                self.prefix_queries += len(sequence.tokens)
                self.prefix_hits += computed
            count = min(len(sequence.tokens) - computed, budget)
            self._grow(sequence, computed + count, copies)
            chunks.append(Chunk(sequence, computed, computed + count))
            budget -= count
            seats -= 1 + len(sequence.siblings)

    def _grow(self, sequence: Sequence, upto: int, copies: list[PageCopy]) -> bool:
        """Take pages for tokens up to `upto`, from the latest arrivals where there are none left.

        False where the sequence was the latest itself, and waits again.
        """
        while self.cache.missing(sequence.pages, sequence.computed, upto) > self.cache.available:
            victim = self.running.pop()
            self.cache.release(victim.pages)
            victim.computed = 0
            victim.preemptions += 1
            self.preemptions += 1
            self.waiting.appendleft(victim)
            if victim is sequence:
                return False
        copy = self.cache.extend(sequence.pages, sequence.computed, upto)
        copies += [copy] if copy is not None else []
        return True

    def _fork(self, sequence: Sequence) -> None:
        for sibling in sequence.siblings:
            sibling.pages = self.cache.fork(sequence.pages)
            sibling.computed = sequence.computed
            sibling.cached_tokens = sequence.cached_tokens
            self.running.append(sibling)
        sequence.siblings = []
