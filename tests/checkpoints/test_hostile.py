"""Broken and hostile checkpoints: one error each, naming the file and the thing; none of their code runs."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import math
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import sentencepiece
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from tokenizers import decoders, models, pre_tokenizers

from strobe.checkpoints import load
from strobe.checkpoints.tokenizer import Tokenizer
from strobe.errors import CheckpointError, DeviceError, StrobeError, TokenizerError

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


def refused(path: Path | str, *names: str, kind: type[StrobeError] = CheckpointError) -> str:
    with pytest.raises(kind) as caught:
        load(path, device="cpu")
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 10_000
    for name in names:
        assert name in message
    return message


def test_missing_folder(tmp_path):
    refused(tmp_path / "no-such", "no-such", "no such file or folder")
    refused("no such model", "no such model")
    refused("x" * 5000, "no such file or folder")
    refused("a\0b", "no such file or folder")
    refused("", "no such file or folder")
    refused("~no such user/model", "no such file or folder")


def test_empty_folder(tmp_path):
    refused(tmp_path, str(tmp_path), "is empty", "config.json", "params.json")


PIPES = ["model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("name", PIPES)
def test_a_pipe_is_not_waited_for(folder, name):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    refused(folder, name, "no ordinary file")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("name", ["consolidated.01.pth", "tokenizer.model"])
def test_a_pipe_in_a_meta_folder(meta_folder, name):
    (meta_folder / name).unlink(missing_ok=True)
    os.mkfifo(meta_folder / name)
    refused(meta_folder, name, "no ordinary file")


def test_folder_of_something_else(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    refused(tmp_path, "holds no model")
    refused(tmp_path / "notes.txt", "notes.txt", "holds no model")


def test_the_hub_s_refusal_is_one_line(monkeypatch):
    def refuse(*_: object, **__: object) -> str:
        raise OSError("cannot reach the hub\nlong\ntrace")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    refused("some-one/some-model", "some-one/some-model", "cannot reach the hub")


def test_weights_that_do_not_fit(folder, monkeypatch):
    from strobe.models import network

    allocate = network.allocate

    def full(config, *, device, dtype):
        if str(device) != "meta":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return allocate(config, device=device, dtype=dtype)

    monkeypatch.setattr(network, "allocate", full)
    refused(folder, "no room for weights of 0.0 GiB in torch.float32", kind=DeviceError)


def test_unknown_dtype(folder):
    with pytest.raises(CheckpointError, match="int8"):
        load(folder, device="cpu", dtype="int8")


# --- config.json ------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"a": 1', "\x00\x01", "[" * 100_000])
def test_config_that_is_no_json(folder, text):
    (folder / "config.json").write_text(text)
    refused(folder, "config.json")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("architectures", ["MambaForCausalLM"]),
        ("architectures", ["M" * 1_000_000]),
        ("architectures", "Llama"),
        ("architectures", {"a": 1}),
        ("hidden_size", None),
        ("hidden_size", "64"),
        ("hidden_size", 64.5),
        ("hidden_size", -64),
        ("hidden_size", 1 << 60),
        ("hidden_size", True),
        ("num_attention_heads", 0),
        ("num_attention_heads", 7),
        ("num_key_value_heads", 3),
        ("num_hidden_layers", 10**9),
        ("vocab_size", None),
        ("rms_norm_eps", "small"),
        ("hidden_act", "gelu"),
        ("mlp_bias", True),
        ("quantization_config", {"quant_method": "gptq"}),
        ("tie_word_embeddings", "yes"),
        ("rope_parameters", {"rope_type": "yarn", "factor": 4.0}),
        ("rope_parameters", {**YARN, "truncate": False}),
        ("rope_parameters", {**YARN, "mscale": 1.0}),
        ("rope_parameters", {**YARN, "factor": 1e20}),
        ("rope_parameters", {**YARN, "attention_factor": -1.0}),
        ("rope_parameters", {**YARN, "rope_theta": 1.0}),
        ("rope_parameters", {"rope_type": ["llama3"]}),
        ("rope_parameters", {"rope_type": "llama3", "factor": 8.0}),
        ("rope_parameters", {"rope_type": "linear", "factor": 0}),
        ("rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.5}),
        ("rope_scaling", "linear"),
        ("rope_parameters", {"rope_type": "default", "rope_theta": math.inf}),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 1e-320}),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 10**400}),
        ("rms_norm_eps", 10**400),
        ("eos_token_id", "</s>"),
        ("eos_token_id", [1, None]),
        ("head_dim", 7),
    ],
)
def test_config_keys(folder, key, value):
    (folder / "generation_config.json").unlink()
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    refused(folder, "config.json")


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": 0},
        {"sliding_window": 1 << 60},
        {"layer_types": ["full_attention"]},
        {"layer_types": ["full_attention"] * 100_000},
        {"num_hidden_layers": 10**12},
        {"max_window_layers": -(10**12)},
    ],
    ids=str,
)
def test_windows_that_cannot_be(folder, changes):
    """Qwen2 with a window: its layers are counted before a layer is made, and in bounded memory."""
    path = folder / "config.json"
    qwen = {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "sliding_window": 5}
    config = {**json.loads(path.read_text()), **qwen, "layer_types": None, **changes}
    path.write_text(json.dumps(config))
    refused(folder)


@pytest.mark.parametrize("value", [{"do_sample": "yes"}, {"do_sample": True, "top_k": "all"}])
def test_generation_config(folder, value):
    (folder / "generation_config.json").write_text(json.dumps(value))
    refused(folder, "generation_config.json", list(value)[-1])


# --- safetensors ------------------------------------------------------------------------------------


def edited(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    edit(state)
    save_file(state, path)


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    refused(folder, "no model.safetensors", "safetensors")


@pytest.mark.parametrize("keep", [0, 5, 8, 100, -1, -1000])
def test_truncated_safetensors(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(folder, "model.safetensors")


def lying_header(data: bytes, edit: Callable[[dict], None]) -> bytes:
    (size,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + size])
    edit(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    "edit",
    [
        lambda header: header[NORM].update(shape=[1 << 40]),
        lambda header: header[NORM].update(shape=[-64]),
        lambda header: header[NORM].update(shape=[1 << 32, 1 << 32]),
        lambda header: header[NORM].update(dtype="F16"),
        lambda header: header[NORM].update(dtype="X99"),
        lambda header: header[NORM].update(data_offsets=[0, 1 << 50]),
        lambda header: header[NORM].update(data_offsets=[64, 0]),
        lambda header: header.update({NORM: 5}),
        lambda header: header.clear(),
    ],
)
def test_lying_safetensors_header(folder, edit):
    path = folder / "model.safetensors"
    path.write_bytes(lying_header(path.read_bytes(), edit))
    refused(folder, "model.safetensors")


def test_header_longer_than_the_file(folder):
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 62) + path.read_bytes()[8:])
    refused(folder, "model.safetensors")


def test_missing_tensor(folder):
    edited(folder, lambda state: state.pop("model.layers.1.mlp.up_proj.weight"))
    refused(folder, "model.safetensors", "lacks model.layers.1.mlp.up_proj.weight")


def test_unexpected_tensor(folder):
    edited(folder, lambda state: state.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}))
    refused(folder, "model.safetensors", "no place for", "model.layers.0.self_attn.q_proj.bias")


def test_computed_buffers_of_older_checkpoints_are_no_error(folder):
    edited(
        folder, lambda state: state.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)})
    )
    load(folder, device="cpu")


@pytest.mark.parametrize("shape", [(63, 64), (64, 64, 1), (64,), (64, 0)])
def test_wrong_shape(folder, shape):
    name = "model.layers.0.self_attn.o_proj.weight"
    edited(folder, lambda state: state.update({name: torch.zeros(shape)}))
    refused(folder, "model.safetensors", name, str(list(shape)), "[64, 64]")


def test_config_that_lies_about_its_weights(folder):
    """Gigantic sizes are compared with the files before anything is allocated."""
    path = folder / "config.json"
    sizes = {"hidden_size": 1 << 16, "intermediate_size": 1 << 20, "vocab_size": 1 << 22, "head_dim": 1 << 12}
    path.write_text(json.dumps({**json.loads(path.read_text()), **sizes}))
    refused(folder, "model.safetensors", "its config asks for")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.int64])
def test_quantised_weights(folder, dtype):
    edited(folder, lambda state: state.update({name: tensor.to(dtype) for name, tensor in state.items()}))
    refused(folder, "model.safetensors", "supported")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_one_quantised_weight(folder, dtype):
    edited(folder, lambda state: state.update({NORM: state[NORM].to(dtype)}))
    refused(folder, "model.safetensors", NORM, str(dtype))


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "..", "a\\b", "", 5, None])
def test_index_that_leads_out_of_the_folder(folder, formats, name):
    formats.split_safetensors(folder, 2)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][NORM] = name
    path.write_text(json.dumps(index))
    refused(folder, repr(name))


def test_index_that_leaves_a_tensor_out(folder, formats):
    formats.split_safetensors(folder, 2)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"][NORM]
    path.write_text(json.dumps(index))
    refused(folder, "index.json", NORM)


def test_index_that_names_a_missing_file(folder, formats):
    formats.split_safetensors(folder, 3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    refused(folder, "model-00002-of-00003.safetensors")


@pytest.mark.parametrize("weight_map", [None, [], {}, "x"])
def test_index_without_a_map(folder, formats, weight_map):
    formats.split_safetensors(folder, 2)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refused(folder, "index.json", "weight_map")


# --- Meta -------------------------------------------------------------------------------------------


class Code:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.fixture
def meta_folder(tmp_path, formats) -> Path:
    return formats.write_meta(tmp_path / "meta", formats.meta_state(formats.network()), shards=2)


@pytest.mark.parametrize("where", ["instead", "beside"])
def test_pickle_that_wants_code(meta_folder, tmp_path, where):
    path, mark = meta_folder / "consolidated.00.pth", tmp_path / "ran"
    torch.save(Code(mark) if where == "instead" else {**torch.load(path), "x": Code(mark)}, path)
    refused(meta_folder, "consolidated.00.pth", "code is not run", "asks for")
    assert not mark.exists()


def test_raw_pickle(meta_folder, tmp_path):
    mark = tmp_path / "ran"
    (meta_folder / "consolidated.01.pth").write_bytes(pickle.dumps({"x": Code(mark)}))
    refused(meta_folder, "consolidated.01.pth")
    assert not mark.exists()


def test_compressed_pth(meta_folder):
    """Nulls pack a thousandfold: a small file could fill the memory."""
    path = meta_folder / "consolidated.00.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(1 << 20))
    refused(meta_folder, "consolidated.00.pth", "is compressed")


@pytest.mark.parametrize("value", [[torch.zeros(2)], {"a": 1}, {3: torch.zeros(2)}, {}])
def test_pth_of_something_else(meta_folder, value):
    torch.save(value, meta_folder / "consolidated.00.pth")
    refused(meta_folder, "consolidated.00.pth")


@pytest.mark.parametrize("keep", [0, 10, 500, -1, -5000])
def test_truncated_pth(meta_folder, keep):
    path = meta_folder / "consolidated.01.pth"
    path.write_bytes(path.read_bytes()[:keep])
    refused(meta_folder, "consolidated.01.pth")


def test_a_shard_too_few(meta_folder):
    (meta_folder / "consolidated.01.pth").unlink()
    refused(meta_folder, "consolidated.00.pth", "its config asks for")
    (meta_folder / "consolidated.00.pth").rename(meta_folder / "consolidated.01.pth")
    refused(meta_folder, "lacks consolidated.00.pth")
    (meta_folder / "consolidated.01.pth").unlink()
    refused(meta_folder, "no consolidated")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dim", "64"),
        ("dim", 63),
        ("n_heads", 0),
        ("n_layers", 3),
        ("n_layers", 1.5),
        ("multiple_of", 0),
        ("multiple_of", 100),
        ("norm_eps", None),
        ("vocab_size", 301),
        ("rope_theta", float("nan")),
        ("moe", {"num_experts": 8}),
    ],
)
def test_params(meta_folder, key, value):
    path = meta_folder / "params.json"
    params = json.loads(path.read_text())
    params[key] = value
    if value is None:
        del params["dim"]
    path.write_text(json.dumps(params))
    refused(meta_folder, str(meta_folder))


# --- llama2.c ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [0, 1, 2])
@pytest.mark.parametrize("keep", [0, 3, 20, 40, 255, 256, 3000, -1, "longer"])
def test_llama2c_of_a_wrong_length(tmp_path, formats, version, keep):
    path = tmp_path / "model.bin"
    formats.write_llama2c(path, formats.meta_state(formats.network()), version=version, tied=False)
    data = path.read_bytes()
    path.write_bytes(data + b"\0" if keep == "longer" else data[:keep])
    refused(path, "model.bin", "bytes")


@pytest.mark.parametrize("field", range(7))
@pytest.mark.parametrize("value", [0, -5, 2**31 - 1, 3])
def test_llama2c_header(tmp_path, formats, field, value):
    path = tmp_path / "model.bin"
    formats.write_llama2c(path, formats.meta_state(formats.network()), version=0, tied=True)
    data = bytearray(path.read_bytes())
    struct.pack_into("<i", data, 4 * field, value)
    path.write_bytes(data)
    refused(path, "model.bin")


@pytest.mark.parametrize(
    ("at", "value", "says"), [(4, 3, "version 3"), (37, 0, "group size 0"), (37, 7, "group")]
)
def test_llama2c_version_and_group(tmp_path, formats, at, value, says):
    path = tmp_path / "model.bin"
    formats.write_llama2c(path, formats.meta_state(formats.network()), version=2, tied=True)
    data = bytearray(path.read_bytes())
    struct.pack_into("<i", data, at, value)
    path.write_bytes(data)
    refused(path, "model.bin", says)


# --- tokenizers -------------------------------------------------------------------------------------

BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
UNDEFINED = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {},
}
VOCABULARY = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        "\udcff",
        "[" * 100_000,
        json.dumps({"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}),
        json.dumps({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}),
        json.dumps({"model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "": 2}, "merges": [["a", "b"]]}}),
        json.dumps({"model": {"type": "Magic"}}),
        json.dumps({"version": "1.0", "model": VOCABULARY, "decoder": {"type": "WordPiece"}}),
        json.dumps({"version": "1.0", "model": VOCABULARY, "decoder": None}),
        json.dumps({"version": "1.0", "model": VOCABULARY, "decoder": BYTES, "post_processor": UNDEFINED}),
    ],
)
def test_broken_tokenizer_json(folder, text):
    (folder / "tokenizer.json").write_text(text, errors="surrogateescape")
    refused(folder, "tokenizer.json", kind=TokenizerError)


def test_mangled_tokenizer_json(folder):
    """Whatever bytes are lost or changed: it loads, or it is refused by name."""
    backend = tokenizers.Tokenizer(models.BPE(vocab=VOCABULARY["vocab"], merges=[("a", "b")]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    backend.add_special_tokens(["<s>"])
    whole = backend.to_str().encode()
    rng = random.Random()
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(data))
            data[at : at + rng.randint(0, 4)] = rng.choice([b"", b"9", b'"', b"}", b"null", b"-1", b"[]"])
        (folder / "tokenizer.json").write_bytes(data)
        with contextlib.suppress(TokenizerError):
            found = Tokenizer.from_json(folder / "tokenizer.json", {})
            found.decode(found.encode("ab <s>"))


@pytest.mark.parametrize("text", ["{", "[]"])
def test_broken_tokenizer_config(folder, text):
    (folder / "tokenizer_config.json").write_text(text)
    refused(folder, "tokenizer_config.json")


def rank_file(**changes: bytes) -> bytes:
    lines = {str(byte): base64.b64encode(bytes([byte])) + b" %d" % byte for byte in range(256)}
    return b"\n".join({**lines, **changes}.values())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00\x01\x02",
        b"hello world",
        rank_file(**{"5": b"!!! 5"}),
        rank_file(**{"5": b"BQ== five"}),
        rank_file(**{"5": b"BQ== 7"}),
        rank_file(**{"5": b"BA== 5"}),
        rank_file(**{"5": b"BQ== 999999999"}),
        rank_file(**{"5": b"BQ== 99999999999999999999"}),
        rank_file(more=b"AAAA 256", again=b"AAAA 257"),
        b"\n".join(rank_file().split(b"\n")[:200]),
        struct.pack("<BB", 0x0A, 0x7F),
        b"\x0a\x04\x0a\x02ab" * 3,
        b"\x08" + b"\xff" * 12,
        b"\x0a\x02\x0a\xff",
    ],
)
def test_broken_tokenizer_model(meta_folder, data):
    (meta_folder / "tokenizer.model").write_bytes(data)
    refused(meta_folder, "tokenizer.model", kind=TokenizerError)


def test_ranks_that_fill_the_model(meta_folder):
    ranks = [base64.b64encode(bytes([byte])) + b" %d" % byte for byte in range(256)]
    ranks += [base64.b64encode(bytes([65, byte])) + b" %d" % (256 + byte) for byte in range(44)]
    (meta_folder / "tokenizer.model").write_bytes(b"\n".join(ranks))
    refused(meta_folder, "tokenizer.model", "no special ones", kind=TokenizerError)


def test_a_token_as_long_as_a_file(meta_folder, tmp_path, formats):
    """Every cut of a token is looked at: of one of 60 MB, for a week."""
    token = base64.b64encode(b"a" * 2000)
    (meta_folder / "tokenizer.model").write_bytes(rank_file(more=token + b" 256"))
    refused(meta_folder, "tokenizer.model", "2,000 characters", kind=TokenizerError)
    path = tmp_path / "model.bin"
    formats.write_llama2c(path, formats.meta_state(formats.network()), version=0, tied=True)
    vocab_size = formats.network().vocab_size
    pieces = [str(index).encode() for index in range(vocab_size - 1)] + [b"b" * 3000]
    data = b"".join(struct.pack("<fi", 0.0, len(piece)) + piece for piece in pieces)
    (tmp_path / "tokenizer.bin").write_bytes(struct.pack("<I", 3000) + data)
    refused(path, "tokenizer.bin", "3,000 characters", kind=TokenizerError)


@pytest.mark.parametrize("kind", ["unigram", "normalised"])
def test_other_sentencepiece_models(meta_folder, kind):
    stream = io.BytesIO()
    text = ["the king is dead long live the king and all the kings men"] * 50
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_writer=stream,
        vocab_size=30,
        hard_vocab_limit=False,
        model_type="unigram" if kind == "unigram" else "bpe",
        minloglevel=2,
    )
    (meta_folder / "tokenizer.model").write_bytes(stream.getvalue())
    refused(meta_folder, "tokenizer.model", kind if kind == "unigram" else "normalises", kind=TokenizerError)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        struct.pack("<I", 5),
        struct.pack("<Ifi", 5, 0.0, 1 << 30),
        struct.pack("<Ifi", 5, 0.0, -1) * 400,
        struct.pack("<I", 2) + b"".join(struct.pack("<fi", 0.0, 2) + b"ab" for _ in range(300)),
        struct.pack("<I", 2) + b"".join(struct.pack("<fi", 0.0, 2) + b"\xff\xfe" for _ in range(300)),
    ],
)
def test_broken_tokenizer_bin(tmp_path, formats, data):
    path = tmp_path / "model.bin"
    formats.write_llama2c(path, formats.meta_state(formats.network()), version=0, tied=True)
    (tmp_path / "tokenizer.bin").write_bytes(data)
    refused(path, "tokenizer.bin", kind=TokenizerError)
