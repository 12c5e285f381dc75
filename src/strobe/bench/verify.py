"""The same weights through strobe and through transformers: do they agree, and how fast is each?"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from strobe.attention.problem import Paged
from strobe.errors import CheckpointError, MissingExtraError
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
    model = llm.engine.model
    peer = _Peer(llm.path, model)
    prompts = _prompts(llm, max_tokens)
    difference = largest = 0.0
    positions = same = equal = 0
    strobe_s = peer_s = 0.0
    _strobe_greedy(llm, prompts[0], 2)  # what a first call sets up is not timed
    peer.greedy(prompts[0], 2)
    for prompt in prompts:
        ours, theirs = logits(model, prompt), peer.logits(prompt)
        difference = max(difference, float((ours - theirs).abs().max()))
        largest = max(largest, float(theirs.abs().max()))
        same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        positions += len(prompt)
        our_tokens, seconds = _strobe_greedy(llm, prompt, max_tokens)
        strobe_s += seconds
        their_tokens, seconds = peer.greedy(prompt, max_tokens)
        peer_s += seconds
        equal += _agreement(our_tokens, their_tokens)
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


def logits(model: Model, prompt: list[int]) -> torch.Tensor:
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
    )
    with torch.inference_mode():
        return model(batch)


class _Peer:
    """The checkpoint as transformers loads it, in the model's dtype and on its device."""

    def __init__(self, path: Path, model: Model) -> None:
        if not (path / "config.json").is_file():
            raise CheckpointError(f"{path} is no Hugging Face folder, the only kind that transformers reads")
        try:
            from transformers import AutoModelForCausalLM, GenerationConfig
            from transformers.utils import logging
        except ImportError:
            raise MissingExtraError.of("transformers", "integrations") from None
        logging.disable_progress_bar()
        self.device = model.device
        loader: Any = AutoModelForCausalLM
        self.model = loader.from_pretrained(
            path, dtype=model.dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True
        ).to(model.device)
        self.model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)

    def logits(self, prompt: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return self.model(torch.tensor([prompt], device=self.device)).logits[0].float()

    def greedy(self, prompt: list[int], max_tokens: int) -> tuple[list[int], float]:
        ids = torch.tensor([prompt], device=self.device)
        start = time.perf_counter()
        with torch.inference_mode():
            out = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens)
        tokens = out[0, len(prompt) :].tolist()
        return tokens, time.perf_counter() - start


def _strobe_greedy(llm: LLM, prompt: list[int], max_tokens: int) -> tuple[list[int], float]:
    from strobe.engine import SamplingParams

    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=max_tokens)
    start = time.perf_counter()
    (output,) = llm.generate([prompt], params)
    return list(output.token_ids), time.perf_counter() - start


def _prompts(llm: LLM, max_tokens: int) -> list[list[int]]:
    """The texts in the model's tokens, cut to leave room for the answer; without a tokenizer, random ids."""
    engine = llm.engine
    room = max(1, engine.max_model_len - max_tokens)
    if engine.tokenizer is not None:
        return [llm.tokenizer.encode(text)[:room] for text in TEXTS]
    rng = torch.Generator().manual_seed(0)
    vocab_size = engine.model.config.vocab_size
    return [torch.randint(vocab_size, (min(16, room),), generator=rng).tolist() for _ in TEXTS]


def _agreement(ours: list[int], theirs: list[int]) -> int:
    """Tokens before the first difference."""
    return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(ours))
