"""An engine under random load for a long time: nothing lost, no page held, no memory gained."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from strobe.bench.answers import first_wrong
from strobe.bench.memory import device_bytes, host_bytes, let_go
from strobe.bench.results import Row
from strobe.bench.subject import Subject
from strobe.engine import Request, SamplingParams
from strobe.errors import StrobeError

_CHECK_STEPS = 64
"""Steps between two looks at every page's owner."""
_SETTLED = 0.5
"""Memory is compared with what it was when this share of the tokens had been written."""
_GROWTH_MOST = 64 << 20
"""Bytes that a host or a GPU may have gained by then: an allocator's slack. Of a million tokens, 134 each."""
_RECHECKED = 8
"""Greedy answers that are held against PyTorch's own calls at the end."""


@dataclass(frozen=True)
class Soak:
    """Random lengths up to `prompt` and `output`; about one request in `abort_one_in` is dropped midway."""

    tokens: int = 1_000_000
    in_flight: int = 64
    prompt: int = 512
    output: int = 512
    abort_one_in: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.tokens, self.in_flight, self.prompt, self.output) < 1 or self.abort_one_in < 2:
            raise StrobeError(
                f"tokens {self.tokens}, in_flight {self.in_flight}, prompt {self.prompt}, "
                f"output {self.output}; supported: 1 and up"
            )


@dataclass
class _Tally:
    """What became of the requests."""

    live: dict[str, Request] = field(default_factory=dict)
    aborted: set[str] = field(default_factory=set)
    finished: int = 0
    dropped: int = 0
    short: int = 0
    """Requests that ended without all the tokens that were asked for, though nobody dropped them."""
    greedy: list[Request] = field(default_factory=list)


def run(subject: Subject, soak: Soak, on_tokens: Callable[[int], object] = lambda tokens: None) -> Row:
    """Serve requests until `soak.tokens` have been written, then let all end.

    `checked` says: every request that was added ended, with as many tokens as it asked for unless it was
    dropped; no page is held; neither host nor GPU gained memory over the second half; and greedy answers are
    those of PyTorch's own calls.

    Raises:
        StrobeError: a page was lost, shared wrongly, or held by nobody, while it ran.
    """
    engine, rng, tally = subject.engine, random.Random(soak.seed), _Tally()  # noqa: S311 - a load
    before = engine.stats()
    start, added, steps, written, settled = time.perf_counter(), 0, 0, 0, None
    stems = [_tokens(rng, subject, soak.prompt // 2) for _ in range(4)]
    while written < soak.tokens or engine.has_work:
        while written < soak.tokens and len(tally.live) < soak.in_flight:
            request = _request(str(added), rng, subject, soak, stems)
            engine.add(request)
            tally.live[request.request_id] = request
            added += 1
        if tally.live and rng.randrange(soak.abort_one_in * 4) == 0:
            dropped = rng.choice(list(tally.live))
            engine.abort(dropped)
            tally.aborted.add(dropped)
        for chunk in engine.step():
            if chunk.metrics is not None and chunk.request_id in tally.live:
                _end(tally, tally.live.pop(chunk.request_id))
        steps += 1
        if steps % _CHECK_STEPS == 0:
            engine.scheduler.check()
            on_tokens(min(written, soak.tokens))
        written = engine.stats().output_tokens - before.output_tokens
        if settled is None and written >= _SETTLED * soak.tokens:
            settled = _memory()
    seconds, memory = time.perf_counter() - start, _memory()
    engine.scheduler.check()
    wrong = sum(
        first_wrong(subject.model, request.prompt_token_ids, request.output().token_ids) is not None
        for request in tally.greedy[-_RECHECKED:]
    )
    after = engine.stats()
    used = after.used_pages
    grown = [now - then for now, then in zip(memory, settled or memory, strict=True)]
    sound = not (tally.live or tally.short or used or wrong) and max(grown) <= _GROWTH_MOST
    return {
        "case": subject.case(tokens=soak.tokens, in_flight=soak.in_flight, pages=after.pages),
        "provider": "strobe",
        "checked": sound,
        "requests": added,
        "finished": tally.finished,
        "dropped": tally.dropped,
        "lost": len(tally.live),
        "short": tally.short,
        "wrong": wrong,
        "used_pages": used,
        "preemptions": after.preemptions - before.preemptions,
        "prefix_hits": after.prefix_hits - before.prefix_hits,
        "prompt_tokens": after.prompt_tokens - before.prompt_tokens,
        "output_tokens": after.output_tokens - before.output_tokens,
        "steps": steps,
        "s": seconds,
        "host_growth_bytes": grown[0],
        "device_growth_bytes": grown[1],
    }


def _request(
    request_id: str, rng: random.Random, subject: Subject, soak: Soak, stems: list[tuple[int, ...]]
) -> Request:
    """Lengths, sampling and siblings at random; some prompts begin alike."""
    stem = rng.choice(stems) if rng.random() < 0.3 else ()
    prompt = (*stem, *_tokens(rng, subject, rng.randint(1, soak.prompt - len(stem))))
    greedy = rng.random() < 0.5
    options: dict[str, Any] = {"temperature": 0} if greedy else {"seed": rng.getrandbits(32), "top_p": 0.9}
    params = SamplingParams(
        max_tokens=rng.randint(1, soak.output),
        ignore_eos=True,
        n=1 if greedy else rng.choice((1, 1, 1, 2, 3)),
        **options,
    )
    return Request(request_id, prompt, params, stream=rng.random() < 0.5)


def _tokens(rng: random.Random, subject: Subject, count: int) -> tuple[int, ...]:
    vocab_size = subject.model.config.vocab_size
    return tuple(rng.randrange(vocab_size) for _ in range(count))


def _end(tally: _Tally, request: Request) -> None:
    lengths = [len(each.token_ids) for each in request.output().outputs]
    if request.request_id in tally.aborted:
        tally.dropped += 1
        return
    tally.finished += 1
    tally.short += any(length != request.params.max_tokens for length in lengths)
    if request.params.temperature == 0:
        tally.greedy = [*tally.greedy[1 - _RECHECKED :], request]


def _memory() -> tuple[int, int]:
    let_go()
    return host_bytes(), device_bytes()
