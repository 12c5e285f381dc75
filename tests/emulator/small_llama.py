"""A network small enough for the emulator, with sizes that no tile divides."""

from __future__ import annotations

from strobe.models.config import ModelConfig

CONFIG = ModelConfig(
    architecture="llama",
    layers=2,
    hidden=136,
    intermediate=200,
    q_heads=4,
    kv_heads=2,
    head_dim=64,
    vocab_size=301,
    max_position=128,
    norm_eps=1e-5,
)
