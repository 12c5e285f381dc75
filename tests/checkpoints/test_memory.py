"""Loading holds one file's pages at a time: peak host memory beyond the weights, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

LAYERS, HIDDEN, INTERMEDIATE, HEADS, VOCABULARY, FILES = 6, 1024, 2816, 16, 8000, 4

MEASURE = """
import sys
from pathlib import Path
from strobe.checkpoints import load
from strobe.models.network import tensors

def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024

load(sys.argv[2], device="cpu")  # what the first load imports and allocates for good
Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
before = status("VmRSS")
model = load(sys.argv[1], device="cpu").model
print(status("VmHWM") - before - sum(t.numel() * t.element_size() for t in tensors(model.weights)))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("kind", ["huggingface", "meta", "llama2c"])
def test_peak_host_memory(tmp_path, formats, folder, kind):
    """Stored in bfloat16 where the format can, loaded to float32: every piece changes its dtype."""
    state, sizes = (
        big_state(),
        {"dim": HIDDEN, "n_layers": LAYERS, "n_heads": HEADS, "n_kv_heads": HEADS, "multiple_of": 256},
    )
    path, header = tmp_path / kind, [HIDDEN, INTERMEDIATE, LAYERS, HEADS, HEADS, VOCABULARY, 128]
    if kind == "llama2c":
        path = formats.write_llama2c(path.with_suffix(".bin"), state, version=1, tied=False, header=header)
        files = [path]
    elif kind == "meta":
        formats.write_meta(path, state, shards=FILES, params={**sizes, "vocab_size": VOCABULARY})
        files = list(path.glob("*.pth"))
    else:
        files = write_huggingface(path, folder, state)
    largest = max(file.stat().st_size for file in files)
    assert largest > 30e6, "too small to tell"
    command = [sys.executable, "-c", MEASURE, path, folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    beyond = int(done.stdout)
    assert beyond < 1.3 * largest, f"{beyond:,} bytes beyond the weights; the largest file has {largest:,}"


def big_state() -> dict[str, torch.Tensor]:
    """Some 100 million weights under Meta's names."""
    square, wide = (HIDDEN, HIDDEN), (INTERMEDIATE, HIDDEN)
    shapes = {f"attention.w{name}.weight": square for name in "qkvo"}
    shapes |= {"feed_forward.w1.weight": wide, "feed_forward.w3.weight": wide}
    shapes |= {
        "feed_forward.w2.weight": wide[::-1],
        "attention_norm.weight": (HIDDEN,),
        "ffn_norm.weight": (HIDDEN,),
    }
    every = {f"layers.{layer}.{name}": shape for layer in range(LAYERS) for name, shape in shapes.items()}
    every |= {"tok_embeddings.weight": (VOCABULARY, HIDDEN), "output.weight": (VOCABULARY, HIDDEN)}
    every["norm.weight"] = (HIDDEN,)
    return {name: torch.full(shape, 0.01, dtype=torch.bfloat16) for name, shape in every.items()}


def write_huggingface(path: Path, small: Path, state: dict[str, torch.Tensor]) -> list[Path]:
    """The state under Hugging Face's names, in several files; `small` lends its config.json."""
    names = {
        "attention.w": "self_attn.{}_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "tok_embeddings": "model.embed_tokens",
        "output": "lm_head",
    }
    renamed = {}
    for name, tensor in state.items():
        for theirs, ours in names.items():
            if f".{theirs}" in f".{name}":
                letter = name.split(theirs)[1][0]
                name = name.replace(theirs + (letter if "{}" in ours else ""), ours.format(letter))
                break
        renamed[name if name.startswith("lm_head") else "model." + name.removeprefix("model.")] = tensor
    path.mkdir()
    weight_map, files = {}, []
    for index in range(FILES):
        part = dict(list(renamed.items())[index::FILES])
        files.append(path / f"model-{index}.safetensors")
        save_file(part, files[-1])
        weight_map |= dict.fromkeys(part, files[-1].name)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = json.loads((small / "config.json").read_text())
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "head_dim": HIDDEN // HEADS}
    (path / "config.json").write_text(json.dumps({**config, **sizes, **heads, "vocab_size": VOCABULARY}))
    return files
