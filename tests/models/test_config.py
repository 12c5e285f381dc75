"""What a ModelConfig refuses, and what it derives."""

from __future__ import annotations

from dataclasses import replace

import pytest

from strobe.errors import CheckpointError
from strobe.models.config import ModelConfig, Rope

GOOD = ModelConfig(
    architecture="llama",
    layers=2,
    hidden=32,
    intermediate=48,
    q_heads=4,
    kv_heads=2,
    head_dim=8,
    vocab_size=100,
    max_position=64,
    norm_eps=1e-5,
)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("architecture", "mamba"),
        ("layers", 0),
        ("layers", True),
        ("layers", 10**6),
        ("hidden", -1),
        ("hidden", 32.0),
        ("intermediate", "48"),
        ("q_heads", 5),
        ("kv_heads", 3),
        ("head_dim", 7),
        ("vocab_size", 1 << 40),
        ("max_position", None),
        ("norm_eps", float("nan")),
        ("norm_eps", -1e-5),
        ("sliding_window", 0),
        ("sliding_window", 2.5),
        ("rope", None),
        ("eos_token_ids", (2, "3")),
        ("bos_token_id", -1),
    ],
)
def test_refuses_by_name(field, value):
    with pytest.raises(CheckpointError) as error:
        replace(GOOD, **{field: value})
    assert field in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("scaling", "longrope"),
        ("theta", 0.0),
        ("factor", float("inf")),
        ("low_freq_factor", float("nan")),
        ("original_max_position", -1),
        ("beta_fast", 0.0),
        ("attention_factor", float("inf")),
    ],
)
def test_rope_refuses_by_name(field, value):
    with pytest.raises(CheckpointError, match=str(value) if isinstance(value, str) else field):
        Rope(**{field: value})


def test_llama3_factors_must_be_in_order():
    with pytest.raises(CheckpointError, match="low_freq_factor"):
        Rope(scaling="llama3", low_freq_factor=4.0, high_freq_factor=4.0)


def test_window_of_some_layers():
    config = replace(GOOD, sliding_window=5, sliding_layers=frozenset({1}))
    assert (config.window(0), config.window(1)) == ((-1, -1), (4, -1))
    assert replace(GOOD, sliding_window=5).window(0) == (4, -1)
    assert GOOD.window(0) == (-1, -1)
