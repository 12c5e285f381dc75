"""What a format's reader finds in a folder or file, before any weight is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from strobe.checkpoints.checkpoint import GenerationDefaults
from strobe.checkpoints.tokenizer import Tokenizer
from strobe.checkpoints.weights import WeightFile
from strobe.models.config import ModelConfig


@dataclass(frozen=True, eq=False)
class Source:
    """A checkpoint, described."""

    config: ModelConfig
    files: Sequence[WeightFile]
    dtype: torch.dtype
    """What the weights are stored in."""
    tokenizer: Tokenizer | None
    defaults: GenerationDefaults = field(default_factory=GenerationDefaults)
    neighbour_pairs: bool = False
    """Queries and keys are stored for a rotation of neighbouring features (Meta, llama2.c)."""
