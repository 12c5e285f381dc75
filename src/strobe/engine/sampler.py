"""The next token of every scheduled sequence, from the logits of one forward pass."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import torch

from strobe.engine.request import Sequence, TokenLogprobs
from strobe.ops import sampling


@dataclass(frozen=True, eq=False)
class Sampled:
    """Drawn tokens, still on the device: `token_ids` int64 `[rows]`.

    `logprobs` are (chosen `[wanting]`, top values `[wanting, top]`, top ids) of the rows `wanting`.
    """

    token_ids: torch.Tensor
    wanting: tuple[int, ...] = ()
    logprobs: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def read_logprobs(self, sequences: SequenceOf[Sequence]) -> dict[int, TokenLogprobs]:
        """By row, for those that want them. Waits for the device."""
        if self.logprobs is None:
            return {}
        chosen, values, ids = (tensor.tolist() for tensor in self.logprobs)
        tokens = self.token_ids.tolist()
        found = {}
        for i, row in enumerate(self.wanting):
            top = tuple(zip(ids[i], values[i], strict=True))[: sequences[row].params.logprobs]
            found[row] = TokenLogprobs(tokens[row], chosen[i], top)
        return found


class Sampler:
    """`stop_ids` are the model's own end tokens, which `min_tokens` forbids."""

    def __init__(self, stop_ids: SequenceOf[int]) -> None:
        self._stop_ids = tuple(stop_ids)

    def sample(self, logits: torch.Tensor, sequences: SequenceOf[Sequence]) -> Sampled:
        """Draw a token for each sequence from its row of `logits` `[rows, vocab]`."""
        params = [sequence.params for sequence in sequences]
        if all(p.plain for p in params):
            return Sampled(logits.argmax(dim=-1))
        wanting = tuple(row for row, p in enumerate(params) if p.logprobs is not None)
        raw = logits
        forbidden = [
            (row, token)
            for row, (sequence, p) in enumerate(zip(sequences, params, strict=True))
            if p.min_tokens > sequence.output_len
            for token in (*self._stop_ids, *p.stop_token_ids)
            if token < logits.shape[1]
        ]
        penalised = [row for row, p in enumerate(params) if p.penalised]
        if forbidden or penalised:
            logits = logits.float().clone()
        if penalised:
            penalties = self._penalties(logits, [sequences[row] for row in penalised])
            logits[penalised] = sampling.penalise(logits[penalised], penalties)
        if forbidden:
            logits[[row for row, _ in forbidden], [token for _, token in forbidden]] = -torch.inf
        token_ids = logits.argmax(dim=-1)
        random = [row for row, p in enumerate(params) if not p.greedy]
        if random:
            token_ids[random] = self._draw(logits[random].float(), [sequences[row] for row in random])
        if not wanting:
            return Sampled(token_ids)
        top = max(params[row].logprobs or 0 for row in wanting)
        rows = list(wanting)
        asked = sampling.logprobs(raw[rows], token_ids[rows], min(top, raw.shape[1]))
        return Sampled(token_ids, wanting, asked)

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
