"""The bundled model, through transformers: what the card claims is what the files do."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from safetensors.torch import load_file
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from strobe.checkpoints.load import BUNDLED

FILES = {
    "MODEL_CARD.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "training.json",
}
TOKENIZER = Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))
RECORD: dict[str, Any] = json.loads((BUNDLED / "training.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def example() -> Iterator[SimpleNamespace]:
    """The modules of examples/train_tiny, and the text as they split it."""
    folder = str(Path(__file__).parents[1] / "examples" / "train_tiny")
    names = ("corpus", "network", "export", "train")
    sys.path.insert(0, folder)
    try:
        modules = {name: importlib.import_module(name) for name in names}
        text = modules["corpus"].TEXT.read_text(encoding="utf-8")
        training, held_out = modules["corpus"].split(text)
        yield SimpleNamespace(text=text, training=training, held_out=held_out, **modules)
    finally:
        sys.path.remove(folder)
        for name in names:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(BUNDLED)


@torch.no_grad()
def log_probs(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([ids])).logits[0].log_softmax(-1)


def test_files_are_complete_and_small() -> None:
    files = {path.name: path.stat().st_size for path in BUNDLED.iterdir()}
    assert files.keys() == FILES
    assert sum(files.values()) <= 12_000_000
    assert {tensor.dtype for tensor in load_file(BUNDLED / "model.safetensors").values()} == {torch.bfloat16}


def test_script_makes_this_architecture(example: SimpleNamespace) -> None:
    config = json.loads((BUNDLED / "config.json").read_text(encoding="utf-8"))
    assert config == example.export.config(example.network.Shape())


def test_script_trains_by_the_recorded_recipe(example: SimpleNamespace) -> None:
    assert RECORD["recipe"] == dataclasses.asdict(example.train.Recipe())


def test_held_out_text_is_the_last_tenth(example: SimpleNamespace) -> None:
    assert example.training + example.held_out == example.text
    assert len(example.held_out) / len(example.text) == pytest.approx(0.1, abs=1e-3)
    for text, counts in ((example.training, RECORD["training"]), (example.held_out, RECORD["held_out"])):
        assert len(text) == counts["characters"]
        assert len(TOKENIZER.encode(text, add_special_tokens=False)) == counts["tokens"]


def test_tokenizer_saw_the_training_text_only(example: SimpleNamespace) -> None:
    trained = example.corpus.train_tokenizer(example.training, TOKENIZER.get_vocab_size())
    assert json.loads(trained.to_str())["model"] == json.loads(TOKENIZER.to_str())["model"]


@given(st.text(max_size=200))
def test_tokenizer_round_trips_any_text(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text


def test_tokenizer_has_every_byte() -> None:
    assert set(pre_tokenizers.ByteLevel.alphabet()) <= TOKENIZER.get_vocab().keys()


def test_special_tokens_agree_between_files(tokenizer: PreTrainedTokenizerBase) -> None:
    config = json.loads((BUNDLED / "config.json").read_text(encoding="utf-8"))
    generation = json.loads((BUNDLED / "generation_config.json").read_text(encoding="utf-8"))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert config[name] == generation[name] == getattr(tokenizer, name)
    assert tokenizer("")["input_ids"] == [tokenizer.bos_token_id]


def test_transformers_computes_what_was_trained(example: SimpleNamespace, model: torch.nn.Module) -> None:
    weights = load_file(BUNDLED / "model.safetensors")
    network = example.network.Network(example.network.Shape(), dropout=0.0)
    network.load_state_dict({name.removeprefix("model."): w.float() for name, w in weights.items()})
    ids = TOKENIZER.encode(example.held_out[:1500]).ids
    with torch.no_grad():
        expected = network(torch.tensor([ids]))[0].log_softmax(-1)
    torch.testing.assert_close(log_probs(model, ids), expected, atol=1e-4, rtol=0)


def test_held_out_loss(example: SimpleNamespace, model: torch.nn.Module) -> None:
    """On the first 3 windows of the held-out text: 2,048 tokens, each scored once, as the card does."""
    text = example.held_out
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids[:2048]
    nats = 0.0
    for start, scored_from in ((0, 0), (512, 512), (1024, 512)):
        window = ids[start : start + 1024]
        scores = log_probs(model, [TOKENIZER.token_to_id("<|bos|>"), *window[:-1]])
        nats += F.nll_loss(scores[scored_from:], torch.tensor(window[scored_from:]), reduction="sum").item()
    characters = len(TOKENIZER.decode(ids))
    assert text.startswith(TOKENIZER.decode(ids))
    assert nats / characters < 1.45


def test_chat_template_writes_speeches(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [
        {"role": "system", "content": "Two households."},
        {"role": "user", "content": " What light? "},
        {"role": "assistant", "content": "Ay me!"},
        {"role": "user", "name": "Nurse", "content": "Madam!"},
    ]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|bos|><|turn|>Chorus:\nTwo households.<|eos|><|turn|>ROMEO:\nWhat light?<|eos|>"
        "<|turn|>JULIET:\nAy me!<|eos|><|turn|>Nurse:\nMadam!<|eos|><|turn|>JULIET:\n"
    )


def test_turns_end_in_a_chat_and_a_play_goes_on(example: SimpleNamespace, model: torch.nn.Module) -> None:
    corpus = example.corpus
    speeches = corpus.speeches(TOKENIZER, example.held_out[:2000])[:-1]
    play, _ = corpus.as_play(TOKENIZER, speeches)
    chat, _ = corpus.as_chat(speeches)
    ends_play, ends_chat = (
        log_probs(model, [corpus.BOS_ID, *ids.tolist()[:-1]])[:, corpus.EOS_ID].exp() for ids in (play, chat)
    )
    turn_ends = chat == corpus.EOS_ID
    assert ends_play.mean() < 0.001
    assert ends_chat[turn_ends].mean() > 10 * ends_chat[~turn_ends].mean()
