"""The next token of every scheduled sequence, from the logits of one forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import torch

from strobe.engine.request import Sequence, TokenLogprobs
from strobe.engine.scheduler import Chunk, Schedule
from strobe.engine.transfer import Readback
from strobe.ops import sampling

_SCORED_ROWS = 256
"""Prompt tokens that are scored at once: a row of log-probabilities has the size of the vocabulary."""


@dataclass(frozen=True)
class Drawn:
    """What a step drew, on the host. `logprobs` are by row, of those rows that want them."""

    token_ids: list[int]
    logprobs: dict[int, TokenLogprobs]
    prompt_logprobs: tuple[tuple[Chunk, list[TokenLogprobs]], ...]


class Sampled:
    """Drawn tokens on the device, `token_ids` int64 `[rows]`, and a copy on its way to the host.

    `logprobs` are (chosen `[wanting]`, top values `[wanting, top]`, top ids) of the rows `wanting`, each
    with the number of likeliest tokens that it asks for. `prompt_logprobs` go on from what each chunk's
    request has.
    """

    def __init__(
        self,
        token_ids: torch.Tensor,
        wanting: SequenceOf[tuple[int, int]] = (),
        logprobs: SequenceOf[torch.Tensor] = (),
        prompt_logprobs: tuple[tuple[Chunk, list[TokenLogprobs]], ...] = (),
    ) -> None:
        self.token_ids = token_ids
        self._wanting = wanting
        self._prompt_logprobs = prompt_logprobs
        self._readback = Readback(token_ids.device)
        self._copies = [self._readback.copy(tensor) for tensor in (token_ids, *logprobs)]
        self._readback.sent()

    def read(self) -> Drawn:
        """Waits for the draw, and for nothing that was launched after it."""
        self._readback.wait()
        tokens, *logprobs = (copy.tolist() for copy in self._copies)
        found = {}
        for (row, top), chosen, values, ids in zip(self._wanting, *logprobs, strict=True):
            found[row] = _token_logprobs(tokens[row], chosen, ids[:top], values[:top])
        return Drawn(tokens, found, self._prompt_logprobs)


def _token_logprobs(token: int, logprob: float, ids: list[int], values: list[float]) -> TokenLogprobs:
    return TokenLogprobs(token, logprob, tuple(zip(ids, values, strict=True)))


class Sampler:
    """`stop_ids` are the model's own end tokens, which `min_tokens` forbids."""

    def __init__(self, stop_ids: SequenceOf[int]) -> None:
        self._stop_ids = tuple(stop_ids)

    def waits_for(self, sequences: SequenceOf[Sequence]) -> bool:
        """True where a draw depends on the tokens before it in ways that the host works out, so that the
        step before must be read first: penalties count them, a grammar goes on from them."""
        return any(sequence.matcher is not None or sequence.params.penalised for sequence in sequences)

    def sample(self, logits: torch.Tensor, schedule: Schedule) -> Sampled:
        """A token for each of `schedule.sampled`, from `logits` as `Runner.run` lays them out."""
        count = len(schedule.sampled)
        scores = tuple(self._score_prompts(logits[count:], schedule))
        sequences, rows = schedule.sampled, logits[:count]
        token_ids = self._draw_rows(rows, sequences)
        wanting = [
            (row, s.params.logprobs) for row, s in enumerate(sequences) if s.params.logprobs is not None
        ]
        if not wanting:
            return Sampled(token_ids, prompt_logprobs=scores)
        asked = [row for row, _ in wanting]
        top = min(max(top for _, top in wanting), rows.shape[1])
        return Sampled(token_ids, wanting, sampling.logprobs(rows[asked], token_ids[asked], top), scores)

    def _draw_rows(self, logits: torch.Tensor, sequences: SequenceOf[Sequence]) -> torch.Tensor:
        """A token for each sequence from its row of `logits` `[rows, vocab]`."""
        params = [sequence.params for sequence in sequences]
        if all(p.plain for p in params):
            return logits.argmax(dim=-1)
        forbidden = [
            (row, token)
            for row, (sequence, p) in enumerate(zip(sequences, params, strict=True))
            if p.min_tokens > sequence.output_len
            for token in (*self._stop_ids, *p.stop_token_ids)
            if token < logits.shape[1]
        ]
        penalised = [row for row, p in enumerate(params) if p.penalised]
        biased = [(row, *item) for row, p in enumerate(params) for item in p.biases]
        bound = [
            row for row, s in enumerate(sequences) if s.matcher is not None and s.finish_reason is None
        ]  # a row that the step before ended draws what is then dropped
        if forbidden or penalised or biased or bound:
            logits = logits.float().clone()
        if penalised:
            penalties = self._penalties(logits, [sequences[row] for row in penalised])
            logits[penalised] = sampling.penalise(logits[penalised], penalties)
        if forbidden:
            logits[[row for row, _ in forbidden], [token for _, token in forbidden]] = -torch.inf
        if biased:
            rows, tokens, biases = zip(*biased, strict=True)
            logits[list(rows), list(tokens)] += torch.tensor(biases).to(logits.device)
        if bound:
            allowed = self._allowed([sequences[row] for row in bound], logits.shape[1])
            logits[bound] = logits[bound].masked_fill(~allowed.to(logits.device), -torch.inf)
        token_ids = logits.argmax(dim=-1)
        random = [row for row, p in enumerate(params) if not p.greedy]
        if random:
            token_ids[random] = self._draw(logits[random].float(), [sequences[row] for row in random])
        return token_ids

    def _score_prompts(
        self, logits: torch.Tensor, schedule: Schedule
    ) -> Iterator[tuple[Chunk, list[TokenLogprobs]]]:
        """For each chunk of `schedule.scored` those prompt tokens that it gives log-probabilities of, and
        that have none yet; `logits` has a row for each of its tokens."""
        row = 0
        for index in schedule.scored:
            chunk = schedule.chunks[index]
            request = chunk.sequence.request
            known, prompt, top = (
                len(request.prompt_logprobs),
                request.prompt_token_ids,
                request.params.prompt_logprobs,
            )
            first, end = max(chunk.start, known), min(chunk.end, len(prompt) - 1)
            scores: list[TokenLogprobs] = []
            for start in range(first, end, _SCORED_ROWS):
                stop = min(start + _SCORED_ROWS, end)
                targets = torch.tensor(prompt[start + 1 : stop + 1], device=logits.device)
                rows = logits[row + start - chunk.start : row + stop - chunk.start]
                chosen, values, ids = sampling.logprobs(rows, targets, min(top or 0, logits.shape[1]))
                scores += map(
                    _token_logprobs, targets.tolist(), chosen.tolist(), ids.tolist(), values.tolist()
                )
            row += chunk.end - chunk.start
            yield chunk, scores

    def _draw(self, logits: torch.Tensor, sequences: SequenceOf[Sequence]) -> torch.Tensor:
        def column(values: list[float], dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype).to(logits.device, non_blocking=True)

        params = [sequence.params for sequence in sequences]
        uniforms = sampling.uniform(
            np.array([sequence.seed for sequence in sequences], dtype=np.uint64),
            np.array([sequence.output_len for sequence in sequences], dtype=np.uint64),
        )
        filters = None
        if any(p.top_k > 0 or p.top_p < 1 or p.min_p > 0 for p in params):
            filters = sampling.Filters(
                top_k=column([p.top_k if p.top_k > 0 else logits.shape[1] for p in params], torch.int64),
                top_p=column([p.top_p for p in params]),
                min_p=column([p.min_p for p in params]),
            )
        temperature = column([p.temperature for p in params])
        return sampling.draw(logits, temperature, filters, torch.from_numpy(uniforms).to(logits.device))

    def _allowed(self, sequences: list[Sequence], vocab: int) -> torch.Tensor:
        """bool `[rows, vocab]`: what each sequence's grammar lets come next."""
        allowed = torch.zeros(len(sequences), vocab, dtype=torch.bool)
        for row, sequence in zip(allowed, sequences, strict=True):
            if sequence.matcher is not None:
                tokens = torch.from_numpy(sequence.matcher.allowed()[:vocab])
                row[: len(tokens)] = tokens
        return allowed

    def _penalties(self, logits: torch.Tensor, sequences: SequenceOf[Sequence]) -> sampling.Penalties:
        device, vocab = logits.device, logits.shape[1]

        def counts(texts: list[SequenceOf[int]]) -> torch.Tensor:
            row = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
            flat = row * vocab + np.concatenate([np.asarray(text, dtype=np.int64) for text in texts])
            counted = np.bincount(flat, minlength=len(texts) * vocab).astype(np.float32)
            return torch.from_numpy(counted.reshape(len(texts), vocab)).to(device)

        def column(values: list[float]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.float32).unsqueeze(1).to(device)

        return sampling.Penalties(
            prompt=counts([sequence.request.prompt_token_ids for sequence in sequences]) > 0,
            output=counts([sequence.output for sequence in sequences]),
            repetition=column([sequence.params.repetition_penalty for sequence in sequences]),
            presence=column([sequence.params.presence_penalty for sequence in sequences]),
            frequency=column([sequence.params.frequency_penalty for sequence in sequences]),
        )
