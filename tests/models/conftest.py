"""Small random networks of every family, and a row of text run through strobe's paged cache by hand."""

from __future__ import annotations

import datetime
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
import transformers

from strobe.attention.problem import Paged
from strobe.checkpoints import load
from strobe.models.batch import Batch, KvTensors
from strobe.models.network import Model

VOCABULARY = 211
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}


def _llama(heads: int, kv_heads: int, **extra: object) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(**SMALL, num_attention_heads=heads, num_key_value_heads=kv_heads, **extra)


FAMILIES: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "llama2": lambda: _llama(4, 4),
    "llama3": lambda: _llama(6, 2, rope_parameters={"rope_type": "default", "rope_theta": 500000.0}),
    "llama3.1": lambda: _llama(4, 2, rope_parameters=LLAMA3_ROPE, rms_norm_eps=1e-5),
    "llama3.2-tied": lambda: _llama(
        6, 3, rope_parameters={**LLAMA3_ROPE, "factor": 32.0}, tie_word_embeddings=True
    ),
    "llama-linear-rope": lambda: _llama(
        4, 1, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}
    ),
    "llama-biased": lambda: _llama(4, 2, attention_bias=True, head_dim=20),
    "mistral": lambda: transformers.MistralConfig(
        **SMALL, num_attention_heads=6, num_key_value_heads=2, sliding_window=9
    ),
    "mistral-no-window": lambda: transformers.MistralConfig(
        **SMALL, num_attention_heads=4, num_key_value_heads=1, sliding_window=None, head_dim=16
    ),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL, num_attention_heads=6, num_key_value_heads=2),
    "qwen2-window": lambda: transformers.Qwen2Config(
        **SMALL,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=1,
    ),
    "qwen2-yarn": lambda: transformers.Qwen2Config(
        **SMALL, num_attention_heads=6, num_key_value_heads=2, rope_parameters=YARN_ROPE
    ),
    "qwen3": lambda: transformers.Qwen3Config(
        **SMALL, num_attention_heads=6, num_key_value_heads=2, head_dim=24, tie_word_embeddings=True
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=48, n_head=4, n_layer=3, n_positions=256, bos_token_id=1, eos_token_id=2
    ),
    "gpt2-untied": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=36,
        n_head=3,
        n_layer=2,
        n_positions=256,
        n_inner=50,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    ),
}


def random_network(config: transformers.PretrainedConfig, seed: int) -> transformers.PreTrainedModel:
    """A network whose every parameter is random, norms and biases too, so that none can be forgotten."""
    generator = torch.Generator().manual_seed(seed)
    network = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in network.parameters():
            spread = 0.25 if parameter.dim() > 1 else 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
            if parameter.dim() == 1:
                parameter += 1
    return network


class Rows:
    """Rows of text in one paged cache whose pages lie in a random order."""

    def __init__(self, model: Model, rows: int, longest: int, page_size: int = 4, seed: int = 0) -> None:
        pages = -(-longest // page_size)
        order = torch.randperm(rows * pages, generator=torch.Generator().manual_seed(seed))
        self.model = model
        self.table = order.view(rows, pages).to(torch.int32)
        self.cache = KvTensors.allocate(
            model.config, rows * pages, page_size, dtype=model.dtype, device=model.device
        )
        self.lengths = [0] * rows

    def step(
        self, new: Sequence[torch.Tensor], *, packed: bool | None = None, ahead: int = 0
    ) -> list[torch.Tensor]:
        """Append int64 `new[row]` to each row in one forward pass: every new token's logits, by row.

        The first `ahead` rows, of one token each, are laid out by themselves.
        """
        counts = [len(tokens) for tokens in new]
        if packed is None:
            packed = len(set(counts)) > 1
        positions = [torch.arange(at, at + n) for at, n in zip(self.lengths, counts, strict=True)]
        size = self.cache.k.shape[2]
        slots = [
            self.table[row, where // size].long() * size + where % size for row, where in enumerate(positions)
        ]
        self.lengths = [at + n for at, n in zip(self.lengths, counts, strict=True)]

        def layout(rows: slice, packed: bool) -> Paged:
            return Paged(
                self.table[rows],
                torch.tensor(self.lengths[rows], dtype=torch.int32),
                cu_seqlens_q=torch.tensor([0, *counts[rows]]).cumsum(0).to(torch.int32) if packed else None,
                max_q_len=max(counts),
                max_kv_len=max(self.lengths),
            )

        batch = Batch(
            token_ids=torch.cat(list(new)),
            positions=torch.cat(positions),
            slots=torch.cat(slots),
            layout=layout(slice(ahead), False) if ahead else layout(slice(None), packed),
            logits_at=torch.arange(sum(counts)),
            kv_cache=self.cache,
            prompts=layout(slice(ahead, None), True) if ahead else None,
        )
        with torch.inference_mode():
            return list(self.model(batch).split(counts))


@dataclass(frozen=True)
class Pair:
    """The same random weights in transformers and in strobe."""

    theirs: transformers.PreTrainedModel
    ours: Model
    generator: torch.Generator

    def text(self, length: int) -> torch.Tensor:
        """Random token ids."""
        return torch.randint(0, VOCABULARY, (length,), generator=self.generator)


@pytest.fixture(params=FAMILIES, scope="session")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Another seed each day, and one a family."""
    seed = zlib.crc32(f"{request.param} {datetime.date.today()}".encode())
    theirs = random_network(FAMILIES[request.param](), seed)
    folder = tmp_path_factory.mktemp("network")
    theirs.save_pretrained(folder)
    return Pair(theirs, load(folder, device="cpu").model, torch.Generator().manual_seed(seed))


@pytest.fixture
def rows() -> type[Rows]:
    return Rows
