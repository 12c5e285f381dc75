"""Writers of every checkpoint format, from the same random network, independent of the readers."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from strobe.attention.problem import Paged
from strobe.models.batch import Batch, KvTensors
from strobe.models.network import Model

HIDDEN, HEADS, KV_HEADS, LAYERS, VOCABULARY = 64, 8, 4, 2, 300
INTERMEDIATE = 192  # what Meta's formula gives for a dim of 64 in multiples of 32
STATE = dict[str, torch.Tensor]


def network(*, tied: bool = False, theta: float = 10000.0, **extra: object) -> transformers.LlamaForCausalLM:
    """A random Llama in transformers: what every format must load to."""
    config = transformers.LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        vocab_size=VOCABULARY,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        rope_parameters=extra.pop("rope_parameters", {"rope_type": "default", "rope_theta": theta}),
        attn_implementation="eager",
        **extra,
    )
    found = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter.dim() == 1))
    return found


def interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Hugging Face's rows (pairs half a head apart) → Meta's (pairs side by side)."""
    half = weight.shape[0] // heads // 2
    out = torch.empty_like(weight)
    for head in range(heads):
        for pair in range(half):
            at = head * 2 * half
            out[at + 2 * pair] = weight[at + pair]
            out[at + 2 * pair + 1] = weight[at + half + pair]
    return out


def meta_state(theirs: transformers.LlamaForCausalLM) -> STATE:
    """The network's weights under Meta's names and in Meta's order."""
    state = {name: tensor.detach() for name, tensor in theirs.state_dict().items()}
    found = {
        "tok_embeddings.weight": state["model.embed_tokens.weight"],
        "norm.weight": state["model.norm.weight"],
        "output.weight": state["lm_head.weight"],
    }
    for layer in range(LAYERS):
        hf, meta = f"model.layers.{layer}.", f"layers.{layer}."
        found |= {
            meta + "attention.wq.weight": interleave(state[hf + "self_attn.q_proj.weight"], HEADS),
            meta + "attention.wk.weight": interleave(state[hf + "self_attn.k_proj.weight"], KV_HEADS),
            meta + "attention.wv.weight": state[hf + "self_attn.v_proj.weight"],
            meta + "attention.wo.weight": state[hf + "self_attn.o_proj.weight"],
            meta + "feed_forward.w1.weight": state[hf + "mlp.gate_proj.weight"],
            meta + "feed_forward.w2.weight": state[hf + "mlp.down_proj.weight"],
            meta + "feed_forward.w3.weight": state[hf + "mlp.up_proj.weight"],
            meta + "attention_norm.weight": state[hf + "input_layernorm.weight"],
            meta + "ffn_norm.weight": state[hf + "post_attention_layernorm.weight"],
        }
    return found


def write_meta(
    folder: Path, state: STATE, *, shards: int = 1, embedding_dim: int = 0, params: dict | None = None
) -> Path:
    """params.json and consolidated.NN.pth, split as Meta splits them."""
    columns = ("attention.wo.weight", "feed_forward.w2.weight")
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(shards):
        part = {}
        for name, tensor in state.items():
            if name.endswith("norm.weight"):
                part[name] = tensor
                continue
            dim = embedding_dim if name.startswith("tok_") else int(name.endswith(columns))
            part[name] = tensor.chunk(shards, dim)[index].clone()
        part["rope.freqs"] = torch.zeros(4)
        torch.save(part, folder / f"consolidated.{index:02d}.pth")
    (folder / "params.json").write_text(
        json.dumps(
            {
                "dim": HIDDEN,
                "n_layers": LAYERS,
                "n_heads": HEADS,
                "n_kv_heads": KV_HEADS,
                "multiple_of": 32,
                "norm_eps": 1e-5,
                "vocab_size": VOCABULARY,
                **(params or {}),
            }
        )
    )
    return folder


HEADER = [HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, VOCABULARY, 128]


def write_llama2c(
    path: Path, state: STATE, *, version: int, tied: bool, group: int = 32, header: Sequence[int] = HEADER
) -> Path:
    """A llama2.c file of version 0 (legacy), 1 or 2."""

    def layers(name: str) -> list[torch.Tensor]:
        return [state[f"layers.{layer}.{name}.weight"] for layer in range(header[2])]

    matrices = (
        [
            tensor
            for name in ("attention.wq", "attention.wk", "attention.wv", "attention.wo")
            for tensor in layers(name)
        ],
        [tensor for name in ("w1", "w2", "w3") for tensor in layers("feed_forward." + name)],
    )
    header = list(header)
    embedding, head = state["tok_embeddings.weight"], state["output.weight"]
    with path.open("wb") as file:

        def floats(*tensors: torch.Tensor) -> None:
            for tensor in tensors:
                file.write(tensor.float().contiguous().numpy().tobytes())

        def quantised(*tensors: torch.Tensor) -> None:
            for tensor in tensors:
                rows = tensor.float().reshape(-1, group)
                scale = rows.abs().amax(1) / 127
                file.write(torch.round(rows / scale[:, None]).to(torch.int8).numpy().tobytes())
                file.write(scale.numpy().tobytes())

        if version == 0:
            header[5] *= 1 if tied else -1
            file.write(struct.pack("<7i", *header))
            floats(embedding, *layers("attention_norm"), *matrices[0], *layers("ffn_norm"), *matrices[1])
            floats(state["norm.weight"], torch.zeros(128 * HIDDEN // HEADS))
            floats(*([] if tied else [head]))
            return path
        file.write(struct.pack("<Ii7iB", 0x616B3432, version, *header, tied))
        file.write(struct.pack("<i", group) if version == 2 else b"")
        file.write(bytes(256 - file.tell()))
        floats(*layers("attention_norm"), *layers("ffn_norm"), state["norm.weight"])
        write = quantised if version == 2 else floats
        write(embedding, *matrices[0], *matrices[1], *([] if tied else [head]))
    return path


def dequantised(state: STATE, group: int = 32) -> STATE:
    """What is left of a network's matrices after int8 and back."""
    found = {}
    for name, tensor in state.items():
        rows = tensor.reshape(-1, group)
        scale = rows.abs().amax(1, keepdim=True) / 127
        found[name] = (
            (torch.round(rows / scale) * scale).reshape(tensor.shape) if tensor.dim() > 1 else tensor
        )
    return found


def split_safetensors(folder: Path, files: int) -> None:
    """Turn a folder's model.safetensors into several, with their index."""
    from safetensors.torch import load_file

    single = folder / "model.safetensors"
    state = load_file(single)
    single.unlink()
    weight_map = {}
    for index, names in enumerate(np.array_split(sorted(state), files)):
        name = f"model-{index + 1:05d}-of-{files:05d}.safetensors"
        save_file({key: state[key] for key in names}, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names.tolist(), name)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


def logits(model: Model, text: torch.Tensor) -> torch.Tensor:
    """float32 `[tokens, vocab_size]` of one text, through strobe's cache."""
    count = len(text)
    cache = KvTensors.allocate(model.config, 1, count, dtype=model.dtype, device=model.device)
    layout = Paged(
        torch.zeros(1, 1, dtype=torch.int32), torch.tensor([count], dtype=torch.int32), max_kv_len=count
    )
    at = torch.arange(count)
    with torch.inference_mode():
        return model(Batch(text, at, at, layout, at, cache))


@pytest.fixture
def assert_equal_logits() -> Callable[[Model, transformers.PreTrainedModel], None]:
    def check(ours: Model, theirs: transformers.PreTrainedModel) -> None:
        text = torch.randint(0, VOCABULARY, (33,))
        with torch.inference_mode():
            expected = theirs(text[None]).logits[0].float()
        assert expected.std() > 0.1
        assert (logits(ours, text) - expected).abs().max() < 1e-4

    return check


@pytest.fixture
def formats() -> object:
    """This file's writers."""
    import types

    names = (network, meta_state, write_meta, write_llama2c, dequantised, split_safetensors, logits)
    return types.SimpleNamespace(**{function.__name__: function for function in names})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small, whole Hugging Face folder, to be broken."""
    network().save_pretrained(tmp_path)
    return tmp_path
