"""Write the trained network as a Hugging Face folder that transformers, and strobe, read as they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from corpus import BOS, BOS_ID, EOS, EOS_ID
from network import Shape
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

# A message may name its speaker.
CHAT_TEMPLATE = (
    "{%- set speakers = {'system': 'Chorus', 'user': 'ROMEO', 'assistant': 'JULIET'} -%}"
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- set speaker = message['name'] if message['name'] is defined else speakers[message['role']] -%}"
    "{{- '<|turn|>' + speaker + ':\\n' + message['content'] | trim + eos_token -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|turn|>' + speakers['assistant'] + ':\\n' -}}{%- endif -%}"
)

CARD_TEMPLATE = Path(__file__).with_name("model_card.template.md")


def config(shape: Shape) -> dict[str, Any]:
    """config.json, with rope's base both where transformers 5 and where earlier readers look."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": BOS_ID,
        "dtype": "bfloat16",
        "eos_token_id": EOS_ID,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.dim,
        "initializer_range": 0.02,
        "intermediate_size": shape.mlp_dim,
        "max_position_embeddings": shape.context,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": shape.q_heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "pad_token_id": EOS_ID,
        "pretraining_tp": 1,
        "rms_norm_eps": shape.norm_eps,
        "rope_parameters": {"rope_theta": shape.rope_theta, "rope_type": "default"},
        "rope_scaling": None,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": shape.vocab_size,
    }


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_model(
    folder: Path, shape: Shape, weights: Mapping[str, Tensor], tokenizer: Tokenizer, record: dict[str, Any]
) -> None:
    """Write weights, configuration, tokenizer, record and model card into folder, made if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.{name}": weight.contiguous() for name, weight in weights.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = config(shape)
    write_json(folder / "config.json", settings)
    ids = {name: settings[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(folder / "generation_config.json", {**ids, "do_sample": True, "temperature": 0.8})
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "bos_token": BOS,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": EOS,
            "model_max_length": shape.context,
            "pad_token": EOS,
            "padding_side": "left",
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
    write_json(folder / "training.json", record)
    facts = {**vars(shape), **record}
    card = CARD_TEMPLATE.read_text(encoding="utf-8").format(
        **facts, millions=record["parameters"] / 1e6, chat_percent=100 * record["recipe"]["chat_share"]
    )
    (folder / "MODEL_CARD.md").write_text(card, encoding="utf-8")
