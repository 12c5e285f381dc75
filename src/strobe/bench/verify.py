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
    from strobe.engine import LLM
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
    strobe_tokens_per_s: float
    transformers_tokens_per_s: float


def verify(llm: LLM, max_tokens: int = 64) -> Verification:
    """Compare on three short prompts: the logits at each of their positions, then greedy tokens.

    Raises:
        CheckpointError: transformers cannot read the checkpoint, which is of another format.
        MissingExtraError: transformers is not installed.
    """
    model, prompts = llm.engine.model, _prompts(llm, max_tokens)
    strobe, peer = Strobe(llm), Transformers(llm)
    for engine in (strobe, peer):
        engine.one(prompts[0], 2)  # what a first call sets up is not timed
    difference = largest = strobe_s = peer_s = 0.0
    positions = same = equal = 0
    for prompt in prompts:
        given = logits(model, prompt)
        with torch.inference_mode():
            expected = peer.model(torch.tensor([prompt], device=model.device)).logits[0].float()
        difference = max(difference, float((given - expected).abs().max()))
        largest = max(largest, float(expected.abs().max()))
        same += int((given.argmax(-1) == expected.argmax(-1)).sum())
        positions += len(prompt)
        ours, theirs = strobe.one(prompt, max_tokens), peer.one(prompt, max_tokens)
        strobe_s += ours.at_s[-1]
        peer_s += theirs.at_s[-1]
        equal += _agreement(ours.token_ids, theirs.token_ids)
    total = max_tokens * len(prompts)
    return Verification(
        model=llm.name,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
        positions=positions,
        logit_difference=difference,
        largest_logit=largest,
        same_choice=same,
        greedy_tokens=total,
        greedy_equal=equal,
        strobe_tokens_per_s=total / strobe_s,
        transformers_tokens_per_s=total / peer_s,
    )


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
        return model(batch)


def _prompts(llm: LLM, max_tokens: int) -> list[list[int]]:
    """The texts in the model's tokens, cut to leave room for the answer; without a tokenizer, random ids."""
    engine = llm.engine
    room = max(1, engine.max_model_len - max_tokens)
    if engine.tokenizer is not None:
        return [llm.tokenizer.encode(text)[:room] for text in TEXTS]
    rng = torch.Generator().manual_seed(0)
    vocab_size = engine.model.config.vocab_size
    return [torch.randint(vocab_size, (min(16, room),), generator=rng).tolist() for _ in TEXTS]


def _agreement(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """Tokens before the first difference."""
    return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(ours))
