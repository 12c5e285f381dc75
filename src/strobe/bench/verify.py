"""The same weights through strobe and through transformers: do they agree, and how fast is each?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from strobe.attention.problem import Paged
from strobe.bench.engine_peers import Strobe, Transformers
from strobe.models.batch import Batch, KvTensors

if TYPE_CHECKING:
    from strobe.bench.subject import Subject
    from strobe.models.network import Model

TEXTS = (
    "The quick brown fox jumps over the lazy dog, and then it",
    "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak,",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
)
PAGE_SIZE = 16


@dataclass(frozen=True)
class Verification:
    """What the comparison found. Speeds are one sequence's tokens a second, prompt included."""

    model: str
    dtype: str
    device: str
    positions: int
    logit_difference: float
    """Largest absolute difference of any logit at any position."""
    largest_logit: float
    same_choice: int
    """Positions where both have the same likeliest token."""
    greedy_tokens: int
    greedy_equal: int
    """Greedy tokens before the first difference, over all prompts."""
    differences: tuple[Difference, ...]
    """Where the greedy tokens first differ, for each prompt where they do."""
    strobe_tokens_per_s: float
    transformers_tokens_per_s: float

    @property
    def agrees(self) -> bool:
        """Every logit within the dtype's tolerance of the largest, and every first difference a tie.

        In float32 the tolerance is 0.001; in 16 bits a logit is a sum of many roundings.
        """
        share = TOLERANCE[self.dtype]
        close = self.logit_difference <= share * max(1.0, self.largest_logit)
        return close and all(each.gap <= share * max(1.0, self.largest_logit) for each in self.differences)


TOLERANCE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}
"""Of the largest logit."""


@dataclass(frozen=True)
class Difference:
    """The first greedy token of a prompt that differs, with what transformers makes of both tokens."""

    prompt: int
    at: int
    """Index among the output tokens; all before are equal."""
    strobe_token: int
    transformers_token: int
    strobe_logprob: float
    """transformers' log-probability of strobe's token, after the tokens that both wrote."""
    transformers_logprob: float
    """Of its own."""
    logprob_error: float
    """Largest difference between the two engines' log-probabilities of these two tokens."""

    @property
    def gap(self) -> float:
        return abs(self.transformers_logprob - self.strobe_logprob)


def verify(subject: Subject, max_tokens: int = 64) -> Verification:
    """Compare on three short prompts: the logits at each of their positions, then greedy tokens.

    Raises:
        CheckpointError: transformers cannot read the checkpoint, which is of another format.
        MissingExtraError: transformers is not installed.
    """
    model, prompts = subject.model, _prompts(subject, max_tokens)
    strobe, peer = Strobe(subject), Transformers(subject)
    for engine in (strobe, peer):
        engine.one(prompts[0], 2)  # what a first call sets up is not timed
    difference = largest = strobe_s = peer_s = 0.0
    positions = same = equal = 0
    differences = []
    for index, prompt in enumerate(prompts):
        given, expected = logits(model, prompt), _peer_logits(peer, prompt)
        difference = max(difference, float((given - expected).abs().max()))
        largest = max(largest, float(expected.abs().max()))
        same += int((given.argmax(-1) == expected.argmax(-1)).sum())
        positions += len(prompt)
        ours, theirs = strobe.one(prompt, max_tokens), peer.one(prompt, max_tokens)
        strobe_s += ours.at_s[-1]
        peer_s += theirs.at_s[-1]
        agreed = _agreement(ours.token_ids, theirs.token_ids)
        equal += agreed
        if agreed < max_tokens:
            tokens = (ours.token_ids[agreed], theirs.token_ids[agreed])
            before = [*prompt, *ours.token_ids[:agreed]]
            differences.append(_difference(model, peer, before, (index, agreed), tokens))
    total = max_tokens * len(prompts)
    return Verification(
        model=subject.name,
        dtype=subject.dtype,
        device=str(model.device),
        positions=positions,
        logit_difference=difference,
        largest_logit=largest,
        same_choice=same,
        greedy_tokens=total,
        greedy_equal=equal,
        differences=tuple(differences),
        strobe_tokens_per_s=total / strobe_s,
        transformers_tokens_per_s=total / peer_s,
    )


def _difference(
    model: Model, peer: Transformers, before: list[int], where: tuple[int, int], tokens: tuple[int, int]
) -> Difference:
    """`tokens` are strobe's and transformers' after `before`; `where` the prompt and the output's index."""
    ours = logits(model, before)[-1].log_softmax(-1)[list(tokens)]
    theirs = _peer_logits(peer, before)[-1].log_softmax(-1)[list(tokens)]
    return Difference(
        *where,
        *tokens,
        strobe_logprob=float(theirs[0]),
        transformers_logprob=float(theirs[1]),
        logprob_error=float((ours - theirs).abs().max()),
    )


def _peer_logits(peer: Transformers, tokens: list[int]) -> torch.Tensor:
    """float32 `[len(tokens), vocab_size]`."""
    with torch.inference_mode():
        return peer.model(torch.tensor([tokens], device=peer.model.device)).logits[0].float()


def logits(
    model: Model, prompt: list[int], *, attention_kernel: str = "auto", linear_kernel: str = "auto"
) -> torch.Tensor:
    """float32 logits `[len(prompt), vocab_size]` of a whole prompt in one forward pass."""
    length, device = len(prompt), model.device
    pages = -(-length // PAGE_SIZE)
    positions = torch.arange(length, device=device)
    batch = Batch(
        token_ids=torch.tensor(prompt, device=device),
        positions=positions,
        slots=positions,
        layout=Paged(
            page_table=torch.arange(pages, dtype=torch.int32, device=device).unsqueeze(0),
            seq_lens=torch.tensor([length], dtype=torch.int32, device=device),
            max_q_len=length,
            max_kv_len=length,
        ),
        logits_at=positions,
        kv_cache=KvTensors.allocate(model.config, pages, PAGE_SIZE, dtype=model.dtype, device=device),
        attention_kernel=attention_kernel,
        linear_kernel=linear_kernel,
    )
    with torch.inference_mode():
        return model(batch).float()


def _prompts(subject: Subject, max_tokens: int) -> list[list[int]]:
    """The texts in the model's tokens, cut to leave room for the answer; without a tokenizer, random ids."""
    engine = subject.engine
    room = max(1, engine.max_model_len - max_tokens)
    if subject.tokenizer is not None:
        return [subject.tokenizer.encode(text)[:room] for text in TEXTS]
    rng = torch.Generator().manual_seed(0)
    vocab_size = engine.model.config.vocab_size
    return [
        torch.randint(vocab_size, (min(length, room),), generator=rng).tolist() for length in (16, 75, 200)
    ]


def _agreement(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """Tokens before the first difference."""
    return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(ours))
