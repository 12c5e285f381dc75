"""The same network out of every format: equal logits."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_model
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from strobe.checkpoints import GenerationDefaults, load, meta
from strobe.checkpoints.huggingface_config import model_config
from strobe.errors import CheckpointError
from strobe.models.config import Rope


@pytest.mark.parametrize("files", [1, 2, 5])
@pytest.mark.parametrize("tied", [False, True])
def test_huggingface(tmp_path, formats, assert_equal_logits, files, tied):
    theirs = formats.network(tied=tied)
    theirs.save_pretrained(tmp_path)
    if files > 1:
        formats.split_safetensors(tmp_path, files)
    found = load(tmp_path, device="cpu")
    assert_equal_logits(found.model, theirs)
    assert found.tokenizer is None
    assert (found.config.tie_embeddings, found.name) == (tied, tmp_path.name)


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_tied_weights_by_the_heads_name(tmp_path, formats, assert_equal_logits, family, files):
    """safetensors' own `save_model` keeps the first of two names, and transformers reads what it leaves."""
    theirs = formats.network(tied=True)
    if family == "gpt2":
        sizes = {"vocab_size": theirs.config.vocab_size, "n_embd": 32, "n_head": 2, "n_layer": 2}
        config = transformers.GPT2Config(**sizes, n_positions=64)
        theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path)
    save_model(theirs, str(tmp_path / "model.safetensors"), metadata={"format": "pt"})
    assert "lm_head.weight" in load_file(tmp_path / "model.safetensors")
    if files > 1:
        formats.split_safetensors(tmp_path, files)
    found = load(tmp_path, device="cpu")
    assert_equal_logits(found.model, theirs)
    assert found.config.tie_embeddings


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_stored_in_16_bits(tmp_path, formats, assert_equal_logits, dtype):
    formats.network().to(getattr(torch, dtype)).save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    found = load(tmp_path, device="cpu")
    assert found.model.dtype == torch.float32, "auto on a CPU"
    assert_equal_logits(found.model, theirs)
    narrow = load(tmp_path, device="cpu", dtype=dtype).model
    assert narrow.dtype == getattr(torch, dtype)
    text = torch.randint(0, narrow.config.vocab_size, (20,))
    wide, rounded = formats.logits(found.model, text), formats.logits(narrow, text)
    assert 0 < (rounded - wide).norm() < 0.1 * wide.norm()


def test_older_rope_keys(tmp_path, formats):
    """What transformers wrote before rope_parameters, and what the first Llama 3.1 files hold."""
    formats.network().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    del values["rope_parameters"]
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }
    path.write_text(json.dumps({**values, "rope_theta": 500000.0, "rope_scaling": scaling}))
    assert load(tmp_path, device="cpu").config.rope == Rope(500000.0, "llama3", 8.0, 1.0, 4.0, 8192)
    path.write_text(
        json.dumps({**values, "rope_theta": 2e4, "rope_scaling": {"type": "linear", "factor": 3}})
    )
    assert load(tmp_path, device="cpu").config.rope == Rope(2e4, "linear", 3.0)
    path.write_text(json.dumps({**values, "rope_theta": 2e4, "rope_scaling": None}))
    assert load(tmp_path, device="cpu").config.rope == Rope(2e4)


def test_rope_scaling_wins_over_rope_parameters():
    """As in transformers: people add it to a config by hand, to go beyond the context it was trained on."""
    newer = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    for more in ({}, {"rope_theta": 7e4}):
        values = {**newer, **more, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
        theirs = transformers.LlamaConfig.from_dict(values)
        told = theirs.rope_parameters
        values = {**theirs.to_dict(), "architectures": ["LlamaForCausalLM"], **values}
        rope = model_config(Path("config.json"), values, {}).rope
        assert rope == Rope(told["rope_theta"], "linear", told["factor"])
    values["rope_scaling"] = {"rope_type": "dynamic", "factor": 4.0}
    with pytest.raises(CheckpointError, match="dynamic"):
        model_config(Path("config.json"), values, {})


def test_yarn_reaches_beyond_the_trained_context():
    """Qwen2.5 and Qwen3 say so: added to a config whose `max_position_embeddings` is the trained one."""
    config = transformers.Qwen2Config(max_position_embeddings=32768).to_dict()
    config |= {"architectures": ["Qwen2ForCausalLM"], "rope_parameters": None, "rope_theta": 1e6}
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    read = model_config(Path("config.json"), {**config, "rope_scaling": scaling}, {})
    grown = 1 + 0.1 * math.log(4)
    assert read.rope == Rope(1e6, "yarn", 4.0, original_max_position=32768, attention_factor=grown)
    assert read.max_position == 131072
    assert read.softmax_scale == pytest.approx(read.head_dim**-0.5 * grown**2)


@pytest.mark.parametrize(("head_dim", "theta"), [(128, 1e6), (64, 1e4), (80, 5e5)])
@pytest.mark.parametrize(
    "extra", [{}, {"beta_fast": 16.0, "beta_slow": 2, "attention_factor": 1.3}, {"factor": 0.5}]
)
def test_yarn_turns_as_in_transformers(head_dim, theta, extra):
    scaling = {"rope_type": "yarn", "rope_theta": theta, "factor": 4.0, **extra}
    scaling["original_max_position_embeddings"] = 4096
    theirs = transformers.LlamaConfig(head_dim=head_dim, rope_parameters=scaling)
    values = {**theirs.to_dict(), "architectures": ["LlamaForCausalLM"]}
    ours = model_config(Path("config.json"), values, {})
    turns, factor = ROPE_INIT_FUNCTIONS["yarn"](theirs, torch.device("cpu"))
    assert ours.frequencies == pytest.approx(turns.tolist(), rel=1e-5)
    assert ours.rope.attention_factor == pytest.approx(factor)


def test_windows_of_configs_without_layer_types():
    """Older Qwen2 configs say from which layer on the window holds; newer ones name each layer's kind."""
    sizes = {"num_hidden_layers": 5, "sliding_window": 7, "max_window_layers": 3, "use_sliding_window": True}
    newer = {**transformers.Qwen2Config(**sizes).to_dict(), "architectures": ["Qwen2ForCausalLM"]}
    older = {key: value for key, value in newer.items() if key != "layer_types"}
    configs = [model_config(Path("config.json"), values, {}) for values in (newer, older)]
    assert configs[0] == configs[1]
    assert [configs[0].window(layer)[0] for layer in range(5)] == [-1, -1, -1, 6, 6]
    assert (
        model_config(Path("config.json"), {**older, "use_sliding_window": False}, {}).sliding_window is None
    )


@pytest.mark.parametrize("family", ["Mistral", "Qwen2"])
@pytest.mark.parametrize("said", [{}, {"sliding_window": None}, {"sliding_window": 40}], ids=str)
def test_a_window_that_a_config_leaves_unsaid(family, said):
    """Left out it is transformers' own default, null is no window."""
    theirs = getattr(transformers, f"{family}Config")(use_sliding_window=True, **said)
    values = {**theirs.to_dict(), "architectures": [f"{family}ForCausalLM"]}
    values = {key: value for key, value in values.items() if key not in ("sliding_window", "layer_types")}
    ours = model_config(Path("config.json"), {**values, **said}, {})
    assert ours.sliding_window == theirs.sliding_window


@pytest.mark.parametrize(
    ("generation", "eos", "defaults"),
    [
        ({}, (2,), GenerationDefaults()),
        ({"eos_token_id": [5, 6]}, (5, 6), GenerationDefaults()),
        ({"do_sample": False, "temperature": 0.6}, (2,), GenerationDefaults(temperature=0.0)),
        ({"temperature": 0.6, "min_p": 0.1}, (2,), GenerationDefaults(temperature=0.6, min_p=0.1)),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1},
            (2,),
            GenerationDefaults(temperature=0.6, top_p=0.9, top_k=20, repetition_penalty=1.1),
        ),
    ],
)
def test_generation_config(folder, generation, eos, defaults):
    (folder / "generation_config.json").write_text(json.dumps(generation))
    found = load(folder, device="cpu")
    assert (found.config.eos_token_ids, found.defaults) == (eos, defaults)


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("embedding_dim", [0, 1])
def test_meta(tmp_path, formats, assert_equal_logits, shards, embedding_dim):
    """Llama 2 splits its embedding by columns (1), Llama 3 by rows (0)."""
    theirs = formats.network()
    formats.write_meta(tmp_path, formats.meta_state(theirs), shards=shards, embedding_dim=embedding_dim)
    assert_equal_logits(load(tmp_path, device="cpu").model, theirs)


def test_meta_llama3(tmp_path, formats, assert_equal_logits):
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    theirs = formats.network(rope_parameters=rope)
    params = {"rope_theta": 500000.0, "use_scaled_rope": True, "rope_scale_factor": 32, "vocab_size": -1}
    formats.write_meta(tmp_path, formats.meta_state(theirs), shards=2, params=params)
    found = load(tmp_path, device="cpu")
    assert_equal_logits(found.model, theirs)
    assert found.config.max_position == 131072


@pytest.mark.parametrize(("dim", "factor"), [(3072, 32), (4096, 8)], ids=["3.2", "3.1"])
def test_meta_leaves_the_rope_factor_unsaid(tmp_path, dim, factor):
    """The params.json of Llama 3.1 8B and 3.2 3B say alike that rope is scaled, and not by how much."""
    said = {"dim": dim, "n_heads": dim // 128, "n_layers": 1, "n_kv_heads": 8, "vocab_size": 16}
    said |= {"multiple_of": 1, "norm_eps": 1e-5, "rope_theta": 5e5, "use_scaled_rope": True}
    (tmp_path / "params.json").write_text(json.dumps(said))
    torch.save({"output.weight": torch.zeros(16, dim)}, tmp_path / "consolidated.00.pth")
    assert meta.read(tmp_path).config.rope == Rope(5e5, "llama3", factor, 1, 4, 8192)


def test_meta_without_a_head_is_tied(tmp_path, formats, assert_equal_logits):
    theirs = formats.network(tied=True)
    state = formats.meta_state(theirs)
    del state["output.weight"]
    formats.write_meta(tmp_path, state, shards=2, embedding_dim=1)
    assert_equal_logits(load(tmp_path, device="cpu").model, theirs)


@pytest.mark.parametrize("version", [0, 1, 2])
@pytest.mark.parametrize("tied", [False, True])
def test_llama2c(tmp_path, formats, assert_equal_logits, version, tied):
    theirs = formats.network(tied=tied)
    if version == 2:
        theirs.load_state_dict(formats.dequantised(theirs.state_dict()))
    path = formats.write_llama2c(
        tmp_path / "model.bin", formats.meta_state(theirs), version=version, tied=tied
    )
    found = load(path, device="cpu")
    assert_equal_logits(found.model, theirs)
    assert (found.name, found.config.tie_embeddings, found.config.max_position) == ("model.bin", tied, 128)


def test_hub_name(folder, monkeypatch):
    """The hub is asked for these files alone; what it gives is read as any folder."""
    import huggingface_hub

    asked = {}

    def snapshot(name, allow_patterns):
        asked.update(name=name, patterns=allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    found = load("some-one/tiny-llama", device="cpu")
    assert (asked["name"], found.name, found.path) == ("some-one/tiny-llama", "some-one/tiny-llama", folder)
    assert not any(pattern.endswith((".bin", ".py", ".pth", "*")) for pattern in asked["patterns"])
