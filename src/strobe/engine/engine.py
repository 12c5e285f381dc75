"""The loop that serves requests: schedule, run, sample, accept."""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from dataclasses import dataclass

from strobe.attention import ladder
from strobe.engine.config import EngineConfig
from strobe.engine.detokenizer import Decoder, Detokenizer
from strobe.engine.kv_cache import KvCache
from strobe.engine.memory import memory_of, plan_memory
from strobe.engine.request import FinishReason, Request, Sequence, StreamChunk
from strobe.engine.runner import Runner
from strobe.engine.sampler import Drawn, Sampled, Sampler, draw_for
from strobe.engine.scheduler import Schedule, Scheduler
from strobe.engine.warm_up import warm_up
from strobe.errors import OutOfPagesError, RequestError
from strobe.linear import ladder as linear_ladder
from strobe.models.network import Model

_SEED_MASK = (1 << 64) - 1
_SIBLING_STRIDE = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class EngineStats:
    """An engine at one moment; the totals count from its start."""

    running: int
    waiting: int
    pages: int
    used_pages: int
    steps: int
    prompt_tokens: int
    output_tokens: int
    preemptions: int
    prefix_queries: int
    prefix_hits: int


class Engine:
    """Serves requests over one model. `add` and `abort` may be called from any thread, `step` from one.

    Raises:
        SettingsError: the KV cache asked for does not fit, or does not hold `max_model_len` tokens.
        UnknownNameError: `attention_kernel` or `linear_kernel` does not exist.
    """

    def __init__(self, model: Model, tokenizer: Decoder | None, config: EngineConfig) -> None:
        if config.attention_kernel != "auto":
            ladder.find(config.attention_kernel, "decode")
        linear_ladder.named(config.linear_kernel)
        memory = memory_of(model.device)
        config = config.on(model.device.type, memory.total)
        self.memory = plan = plan_memory(model, config, memory)
        self.model = model
        self.tokenizer = tokenizer
        self.config = config
        self.max_model_len = plan.max_model_len
        reuse = config.prefix_cache and not config.deterministic
        cache = KvCache(plan.pages, config.page_size, prefix_cache=reuse)
        self.scheduler = Scheduler(config, cache)
        self.runner = Runner(model, config, plan.pages, plan.max_model_len)
        self.sampler = Sampler(draw_for(config.sampling_kernel, model, config.max_num_seqs))
        self._stop_ids = frozenset(model.config.eos_token_ids)
        self._random = random.Random(config.seed)  # noqa: S311 - seeds of samples, not secrets
        self._arrived: deque[Request] = deque()
        self._aborted: deque[str] = deque()
        self._live: dict[str, Request] = {}
        self._launched: deque[tuple[Schedule, Sampled]] = deque()
        """Steps that run, or have run, and were not accepted: one at most between two calls of `step`."""
        self._accepting: Schedule | None = None
        """The step that is being written back; still there after one that failed half-way."""
        self._told: list[StreamChunk] = []
        """What the next return of `step` tells: kept here, so that a step that fails loses nothing."""
        self._live_lock = threading.Lock()
        self._steps = self._prompt_tokens = self._output_tokens = 0
        if model.device.type == "cuda":
            warm_up(self)
            self._steps = self._prompt_tokens = self._output_tokens = 0

    @property
    def has_work(self) -> bool:
        return bool(self._live or self._told)

    def add(self, request: Request) -> None:
        """Queue a request; it joins the next step.

        Raises:
            RequestError: an empty or too long prompt, a token or a number that this model cannot serve,
                or an id that is in use.
            OutOfPagesError: it would never fit the KV cache.
        """
        self.check(request)
        request.max_output = self._max_output(request)
        with self._live_lock:
            if request.request_id in self._live:
                raise RequestError(f"request id {request.request_id!r} is in use")
            self._live[request.request_id] = request
            self._arrived.append(request)

    def check(self, request: Request) -> None:
        """Raise what `add` would."""
        prompt, params = request.prompt_token_ids, request.params
        vocab, context = self.model.config.vocab_size, self.max_model_len
        if not prompt:
            raise RequestError("the prompt is empty", hint="a prompt needs one token at least")
        if min(prompt) < 0 or max(prompt) >= vocab:
            raise RequestError(f"the prompt holds a token outside 0 to {vocab - 1}")
        if len(prompt) >= context:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens; this model's context is {context}, output included"
            )
        if params.max_tokens is not None and params.max_tokens > context:
            raise RequestError(f"max_tokens is {params.max_tokens}; this model's context is {context}")
        if params.stop and self.tokenizer is None:
            raise RequestError("stop holds strings, and this model has no tokenizer", hint="stop_token_ids")
        if any(token >= vocab for token, _ in params.biases):
            raise RequestError(f"logit_bias holds a token outside 0 to {vocab - 1}")
        if params.n > self.config.max_num_seqs:
            raise RequestError(f"n is {params.n}; this engine runs up to {self.config.max_num_seqs}")
        cache = self.scheduler.cache
        together = params.n if self.config.deterministic else 1  # else siblings may take turns
        needed = cache.most_pages(len(prompt), self._max_output(request), together)
        if needed > cache.num_pages:
            raise OutOfPagesError(
                f"the request may need {needed} KV-cache pages; there are {cache.num_pages}",
                hint="lower max_tokens or give the cache more memory",
            )

    def _max_output(self, request: Request) -> int:
        """Most tokens that the request and the context allow."""
        context = self.max_model_len
        return min(request.params.max_tokens or context, context - len(request.prompt_token_ids))

    def abort(self, request_id: str) -> None:
        """Drop a request in the next step, which frees its pages; unknown ids are ignored."""
        self._aborted.append(request_id)

    def drop_running(self) -> list[str]:
        """After a step that failed: drop the requests that were part of it, and keep those that wait.

        Called from the thread that steps. Gives the ids of those dropped.
        """
        while self._launched:
            self.scheduler.forget(self._launched.popleft()[0])
        with self._live_lock:
            kept = {sequence.request.request_id for sequence in self.scheduler.waiting}
            kept |= {request.request_id for request in self._arrived}
            kept -= {sequence.request.request_id for sequence in self.scheduler.running}
            if self._accepting is not None:
                kept -= {sequence.request.request_id for sequence in self._accepting.sampled}
                self._accepting = None
            dropped = [request for request in self._live.values() if request.request_id not in kept]
            for request in dropped:
                del self._live[request.request_id]
        for sequence in (sequence for request in dropped for sequence in request.sequences):
            self.scheduler.finish(sequence, "abort")
        return [request.request_id for request in dropped]

    def step(self) -> list[StreamChunk]:
        """One forward pass for all who have tokens to run; what was read since, and who ended.

        With `overlap` the device runs while the host works: a step is launched before the one ahead of it
        is read, with that one's tokens still on the device. Whoever turns out to be over by then has had a
        step too many, which is dropped.
        """
        self._take_messages()
        schedule = self.scheduler.schedule()
        if schedule.chunks:
            self._note_start(schedule)
            logits = self.runner.run(schedule)
            if schedule.scored or self.sampler.waits_for(schedule.sampled):
                self._accept_launched(but=0)
            sampled = self.sampler.sample(logits, schedule, self.runner.drawn)
            self.scheduler.advance(schedule)
            self._launched.append((schedule, sampled))
        self._accept_launched(but=1 if self.config.overlap and schedule.chunks else 0)
        told, self._told = self._told, []
        return told

    def stats(self) -> EngineStats:
        scheduler = self.scheduler
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting) + len(self._arrived),
            pages=scheduler.cache.num_pages,
            used_pages=scheduler.cache.used,
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            output_tokens=self._output_tokens,
            preemptions=scheduler.preemptions,
            prefix_queries=scheduler.prefix_queries,
            prefix_hits=scheduler.prefix_hits,
        )

    def _take_messages(self) -> None:
        aborts = len(self._aborted)  # their requests have arrived; a later one's may not be seen below
        while self._arrived:
            request = self._arrived.popleft()
            params = request.params
            seed = self._random.getrandbits(64) if params.seed is None else params.seed
            request.sequences = [
                Sequence(
                    request,
                    index,
                    (seed + index * _SIBLING_STRIDE) & _SEED_MASK,
                    list(request.prompt_token_ids),
                    detokenizer=self._detokenizer(request) if request.stream or params.stop else None,
                    matcher=params.grammar.matcher() if params.grammar else None,
                )
                for index in range(params.n)
            ]
            self.scheduler.add(request)
        for _ in range(aborts):
            dropped = self._live.get(self._aborted.popleft())
            unfinished = [s for s in dropped.sequences if s.finish_reason is None] if dropped else []
            self._told += [self._finish(sequence, "abort") for sequence in unfinished]

    def _note_start(self, schedule: Schedule) -> None:
        now = time.monotonic()
        for chunk in schedule.chunks:
            if chunk.sequence.request.started is None:
                chunk.sequence.request.started = now

    def _accept_launched(self, but: int) -> None:
        """Accept launched steps, the latest `but` excepted."""
        while len(self._launched) > but:
            schedule, sampled = self._launched[0]
            drawn = sampled.read()
            self._launched.popleft()
            self._accepting = schedule
            self._accept(schedule, drawn)
            self._accepting = None
        if not self._live:  # what is left was launched for those that are over
            self._launched.clear()

    def _accept(self, schedule: Schedule, drawn: Drawn) -> None:
        """Write a step back: tokens, scores, who is over. Rows that were over before it are dropped."""
        going = [row for row, sequence in enumerate(schedule.sampled) if sequence.finish_reason is None]
        self.scheduler.accept(schedule, drawn.token_ids)
        now = time.monotonic()
        self._steps += 1
        self._output_tokens += len(going)
        for chunk, scores in drawn.prompt_logprobs:
            chunk.sequence.request.prompt_logprobs += scores
        for row in going:
            sequence, token = schedule.sampled[row], drawn.token_ids[row]
            if row in drawn.logprobs:
                sequence.logprobs.append(drawn.logprobs[row])
            request = sequence.request
            if request.first_token is None:
                request.first_token = now
                self._prompt_tokens += len(request.prompt_token_ids)
            reason, stop_reason, text = self._stop(sequence, token)
            if reason is not None:
                self._told.append(self._finish(sequence, reason, stop_reason, text))
            elif request.stream:
                self._told.append(sequence.chunk(text))

    def _stop(self, sequence: Sequence, token: int) -> tuple[FinishReason | None, str | int | None, str]:
        """Whether the token ends the sequence, the stop token or string that did, and the text it settles."""
        params, length = sequence.params, len(sequence.output)
        detokenizer, matcher = sequence.detokenizer, sequence.matcher
        if matcher is not None:
            matcher.accept(token)
        ends = token in params.stop_token_ids or (token in self._stop_ids and not params.ignore_eos)
        if ends and length >= params.min_tokens:
            return "stop", token, ""
        text = ""
        if detokenizer is not None:
            text = detokenizer.push((token,), stops=length >= params.min_tokens)
            sequence.text += text
            if detokenizer.stopped_by is not None:
                return "stop", detokenizer.stopped_by, text
        if matcher is not None and (matcher.failed or matcher.finished):
            return ("abort" if matcher.failed else "stop"), None, text
        return ("length" if length >= sequence.request.max_output else None), None, text

    def _finish(
        self, sequence: Sequence, reason: FinishReason, stop_reason: str | int | None = None, text: str = ""
    ) -> StreamChunk:
        """End a sequence; `text` is what its last token settled."""
        request, detokenizer = sequence.request, sequence.detokenizer
        self.scheduler.finish(sequence, reason, stop_reason)
        sequence.finished_at = time.monotonic()
        if detokenizer is None and (detokenizer := self._detokenizer(request)) is not None:
            spoken = sequence.output[:-1] if isinstance(stop_reason, int) else sequence.output
            text = sequence.text = detokenizer.push(spoken)
        if detokenizer is not None:
            rest = detokenizer.finish()
            text, sequence.text = text + rest, sequence.text + rest
            if detokenizer.stopped_by is not None:
                sequence.finish_reason, sequence.stop_reason = "stop", detokenizer.stopped_by
        if request.finished:
            with self._live_lock:
                self._live.pop(request.request_id, None)
        return sequence.chunk(text if request.stream else sequence.text)

    def _detokenizer(self, request: Request) -> Detokenizer | None:
        if self.tokenizer is None:
            return None
        return Detokenizer(self.tokenizer, request.prompt_token_ids, request.params.stop)
