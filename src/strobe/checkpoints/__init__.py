"""Foreign weights and tokenizers → ours: Hugging Face, Meta and llama2.c."""

from strobe.checkpoints.checkpoint import Checkpoint, GenerationDefaults
from strobe.checkpoints.load import load

__all__ = ["Checkpoint", "GenerationDefaults", "load"]
