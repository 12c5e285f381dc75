from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from strobe.bench.results import Result
from strobe.models import shapes

from .conftest import Cli

SMALL = {
    "vocab_size": 199,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
FAMILIES = {
    "llama": lambda: transformers.LlamaConfig(**SMALL, rope_parameters=LLAMA_3_ROPE),
    "mistral": lambda: transformers.MistralConfig(**SMALL, sliding_window=7),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL),
    "qwen3": lambda: transformers.Qwen3Config(**SMALL, head_dim=24),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=199, n_embd=48, n_head=4, n_layer=3, n_positions=128),
}
LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_agrees(cli: Cli, tmp_path: Path, family: str) -> None:
    network = transformers.AutoModelForCausalLM.from_config(FAMILIES[family]())
    for weight in network.parameters():
        torch.nn.init.normal_(weight, std=0.1)  # biases too, which start at zero
    network.save_pretrained(tmp_path)
    outcome = cli("verify", str(tmp_path), "--device", "cpu", "--max-tokens", "24", "--json")
    found = json.loads(outcome.out)
    assert outcome.code == 0, found
    assert found["logit_difference"] < 1e-4 * max(1.0, found["largest_logit"])
    assert found["greedy_equal"] == found["greedy_tokens"] == 72


def test_same_weights_agree(cli: Cli, model_folder: Path) -> None:
    outcome = cli("verify", str(model_folder), "--device", "cpu", "--max-tokens", "16", "--json")
    assert outcome.code == 0
    found = json.loads(outcome.out)
    assert found["logit_difference"] < 1e-4
    assert found["largest_logit"] > 0
    assert found["same_choice"] == found["positions"] > 50
    assert found["greedy_equal"] == found["greedy_tokens"] == 48
    assert found["strobe_tokens_per_s"] > 0
    text = cli("verify", str(model_folder), "--device", "cpu", "--max-tokens", "16").out
    assert "48 of 48" in text
    assert "tok/s" in text


def test_other_weights_are_found_out(cli: Cli, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from strobe.bench import verify

    honest = verify.logits
    monkeypatch.setattr(verify, "logits", lambda *args: honest(*args) + torch.tensor(0.5))
    outcome = cli("verify", str(model_folder), "--device", "cpu", "--max-tokens", "4", "--json")
    assert outcome.code == 1
    assert json.loads(outcome.out)["logit_difference"] == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize(("dtype", "names"), [("float32", "all"), ("bfloat16", "llama3-8b,qwen3-8b")])
def test_random_weights_of_every_shape_agree(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, names: str
) -> None:
    for name, shape in shapes.SHAPES.items():
        gpt2 = shape.rope is None
        sizes = {"layers": 2, "hidden": 48, "intermediate": 192 if gpt2 else 80, "q_heads": 4, "head_dim": 12}
        sizes |= {"kv_heads": 4 if gpt2 else 2, "vocab_size": 199, "max_position": 128}
        monkeypatch.setitem(shapes.SHAPES, name, replace(shape, **sizes))
    saved = tmp_path / "verify.json"
    flags = ("--device", "cpu", "--dtype", dtype, "--max-tokens", "12", "--save", str(saved), "--json")
    flags += ("--kernel", "torch_naive", "--linear", "torch_linear")  # which need no compiling
    outcome = cli("verify", "--random", names, *flags)
    found = json.loads(outcome.out)
    assert [each["model"] for each in found] == (list(shapes.SHAPES) if names == "all" else names.split(","))
    assert outcome.code == 0, found
    assert all(each["agrees"] for each in found)
    assert [row["checked"] for row in Result.load(saved).rows] == [True] * len(found)
    if dtype == "float32":
        assert all(each["greedy_equal"] == 36 and not each["differences"] for each in found)
    for difference in (each for model in found for each in model["differences"]):
        assert difference["transformers_logprob"] >= difference["strobe_logprob"]
        assert difference["strobe_token"] != difference["transformers_token"]


def test_a_first_difference_is_told_with_its_gap(
    cli: Cli, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from strobe.bench import engine_peers

    honest = engine_peers.Strobe.one

    def lying(self, prompt, output):
        found = honest(self, prompt, output)
        tokens = found.token_ids
        return replace(found, token_ids=tuple(abs(t - (i == 3)) for i, t in enumerate(tokens)))

    monkeypatch.setattr(engine_peers.Strobe, "one", lying)
    outcome = cli("verify", str(model_folder), "--device", "cpu", "--max-tokens", "6", "--json")
    differences = json.loads(outcome.out)["differences"]
    assert [each["at"] for each in differences] == [3, 3, 3]
    assert all(each["transformers_logprob"] > each["strobe_logprob"] for each in differences)
    assert all(each["logprob_error"] < 1e-4 for each in differences)
    assert outcome.code == 1
    assert "prompt 2 differs at 3" in cli("verify", str(model_folder), "--device", "cpu", "-n", "6").out


def test_format_that_transformers_cannot_read(cli: Cli, tmp_path: Path) -> None:
    assert "is empty" in cli("verify", str(tmp_path)).error
