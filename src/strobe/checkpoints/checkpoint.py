"""What a checkpoint gives once it is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from strobe.checkpoints.tokenizer import Tokenizer
    from strobe.models.config import ModelConfig
    from strobe.models.network import Model


@dataclass(frozen=True)
class GenerationDefaults:
    """How the checkpoint's makers sample it; None where they do not say."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A network with its weights, its tokenizer and how it is meant to be sampled."""

    name: str
    """What it was asked for by: a hub name, or the folder's or file's own name."""
    path: Path
    config: ModelConfig
    model: Model
    tokenizer: Tokenizer | None
    """None where the checkpoint brings none: such a model takes and gives token ids."""
    defaults: GenerationDefaults
