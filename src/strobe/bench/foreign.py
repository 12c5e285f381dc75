"""Our networks as other engines take them: a config.json, and transformers' module over our weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from strobe.checkpoints.weights import places
from strobe.errors import MissingExtraError, StrobeError
from strobe.models.config import ModelConfig

if TYPE_CHECKING:
    from strobe.models.network import Model


def huggingface_config(config: ModelConfig, dtype: str = "bfloat16") -> dict[str, Any]:
    """The config.json of a network: what `checkpoints.huggingface_config` reads, the other way round.

    Raises:
        StrobeError: a mixture of switches that no published family has.
    """
    if config.architecture == "gpt2":
        return _gpt2(config) | {"dtype": dtype}
    family = _family(config)
    rope = config.rope
    if rope is None:
        raise StrobeError("a llama network without rotary positions has no published family")
    turn: dict[str, Any] = {"rope_type": "default", "rope_theta": rope.theta}
    if rope.scaling != "none":
        turn |= {"rope_type": rope.scaling, "factor": rope.factor}
    if rope.scaling == "llama3":
        turn |= {
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_position,
        }
    if rope.scaling == "yarn":
        turn |= {
            "original_max_position_embeddings": rope.original_max_position,
            "beta_fast": rope.beta_fast,
            "beta_slow": rope.beta_slow,
            "attention_factor": rope.attention_factor,
        }
    found: dict[str, Any] = {
        "architectures": [family],
        "model_type": family.removesuffix("ForCausalLM").lower(),
        "dtype": dtype,
        "torch_dtype": dtype,
        "num_hidden_layers": config.layers,
        "hidden_size": config.hidden,
        "intermediate_size": config.intermediate,
        "num_attention_heads": config.q_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": rope.theta,
        "rope_parameters": turn,
        "hidden_act": "silu",
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.output_bias,
        "sliding_window": config.sliding_window,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids) or None,
    }
    if rope.scaling != "none":
        found["rope_scaling"] = turn
    return found


def write_config(config: ModelConfig, folder: Path, dtype: str = "bfloat16") -> None:
    """A folder with a config.json alone: all that an engine needs that draws weights of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(huggingface_config(config, dtype), indent=2)
    (folder / "config.json").write_text(text, encoding="utf-8")


def transformers_network(model: Model) -> Any:
    """transformers' module for `model`, its parameters the very memory of ours.

    Raises:
        MissingExtraError: transformers is not installed.
        StrobeError: it names its weights otherwise than its checkpoints do.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        raise MissingExtraError.of("transformers", "integrations") from None
    values = huggingface_config(model.config, str(model.dtype).removeprefix("torch."))
    kind: Any = AutoConfig
    loader: Any = AutoModelForCausalLM
    with torch.device("meta"):
        network = loader.from_config(kind.for_model(**values), dtype=model.dtype)
    ours = places(model.config, model.weights)
    prefix = f"{network.base_model_prefix}."
    for name, _ in list(network.named_parameters()):
        place = ours.get(name, ours.get(name.removeprefix(prefix)))
        if place is None:
            raise StrobeError(f"transformers has a weight {name} that strobe's {values['model_type']} lacks")
        _set(network, name, torch.nn.Parameter(place, requires_grad=False))
    network.tie_weights()
    _fill_buffers(network, model.device)
    return network.eval()


def _fill_buffers(network: Any, device: torch.device) -> None:
    """Buffers hold no weights: their modules compute them once more, on the device."""
    for module in network.modules():
        on_meta = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        if on_meta:
            with torch.device(device):
                fresh = type(module)(module.config)
            for name in on_meta:
                module.register_buffer(name, getattr(fresh, name).to(device), persistent=False)


def _set(network: Any, name: str, parameter: torch.nn.Parameter) -> None:
    path, _, last = name.rpartition(".")
    setattr(network.get_submodule(path), last, parameter)


def _family(config: ModelConfig) -> str:
    switches = [config.qk_norm, config.qkv_bias and not config.output_bias, config.sliding_window is not None]
    if sum(switches) > 1 or (config.output_bias and not config.qkv_bias):
        raise StrobeError("this mixture of biases, norms and windows belongs to no published family")
    if config.qk_norm:
        return "Qwen3ForCausalLM"
    if config.qkv_bias and not config.output_bias:
        return "Qwen2ForCausalLM"
    if config.sliding_window is not None:
        return "MistralForCausalLM"
    return "LlamaForCausalLM"


def _gpt2(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_layer": config.layers,
        "n_embd": config.hidden,
        "n_inner": config.intermediate,
        "n_head": config.q_heads,
        "vocab_size": config.vocab_size,
        "n_positions": config.max_position,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": "gelu_new",
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_ids[0] if config.eos_token_ids else None,
    }
