"""llama2.c's .bin files (karpathy/llama2.c) and the tokenizer.bin beside them.

Three formats: the legacy one (seven integers, then float32; a negative vocabulary size says that
embedding and head are untied), version 1 (a 256-byte header, float32) and version 2 (the same header,
the matrices in int8 with one float32 scale a group).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from strobe.checkpoints import sentencepiece
from strobe.checkpoints.files import read_bytes
from strobe.checkpoints.source import Source
from strobe.checkpoints.tokenizer import SPACE, Tokenizer
from strobe.checkpoints.weights import Places
from strobe.errors import CheckpointError, TokenizerError
from strobe.models.config import ModelConfig

MAGIC = 0x616B3432
_HEADER = struct.Struct("<7i")
_HEADER_SIZE = 256
_TOKENIZER_LIMIT = 64 << 20
_DEQUANTISED_GROUPS = 1 << 16


def holds(path: Path) -> bool:
    """True for a file of this format, by its name."""
    return path.is_file() and path.suffix == ".bin"


def read(path: Path) -> Source:
    """Describe the file `path`.

    Raises:
        CheckpointError, TokenizerError: what is broken, by file.
    """
    file = _open(path)
    tokenizer_path = path.parent / "tokenizer.bin"
    tokenizer = read_tokenizer(tokenizer_path, file.config.vocab_size) if tokenizer_path.exists() else None
    return Source(
        config=file.config,
        files=[file],
        dtype=torch.float32,
        tokenizer=tokenizer,
        neighbour_pairs=True,
    )


@dataclass(frozen=True)
class _Part:
    """One tensor in the file: `group` is the quantisation group's size, 0 for float32; None names padding."""

    name: str | None
    shape: tuple[int, ...]
    group: int = 0

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size + 4 * (self.size // self.group) if self.group else 4 * self.size


@dataclass(frozen=True, eq=False)
class Llama2cFile:
    """A .bin file: its parts lie end to end from byte `start`."""

    path: Path
    config: ModelConfig
    start: int
    parts: tuple[_Part, ...]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {part.name: part.shape for part in self.parts if part.name is not None}

    def views(self, places: Places) -> Places:
        return places

    def read(self) -> Iterator[tuple[str, torch.Tensor]]:
        # copy-on-write: torch has no read-only tensors
        data = np.memmap(self.path, dtype=np.uint8, mode="c")
        at = self.start
        for part in self.parts:
            if part.name is not None:
                yield part.name, torch.from_numpy(_values(data[at : at + part.nbytes], part))
            at += part.nbytes


def _values(data: np.ndarray, part: _Part) -> np.ndarray:
    """A part's float32 values; those that are stored so are a view."""
    if not part.group:
        return data.view("<f4").reshape(part.shape)
    groups = data[: part.size].view(np.int8).reshape(-1, part.group)
    scales = data[part.size :].view("<f4")
    values = np.empty(groups.shape, np.float32)
    for start in range(0, len(groups), _DEQUANTISED_GROUPS):
        rows = slice(start, start + _DEQUANTISED_GROUPS)
        np.multiply(groups[rows], scales[rows, None], out=values[rows])
    return values.reshape(part.shape)


def _open(path: Path) -> Llama2cFile:
    try:
        with path.open("rb") as stream:
            head = stream.read(_HEADER_SIZE)
        size = path.stat().st_size
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    if len(head) < _HEADER.size:
        raise CheckpointError(f"{path} has {len(head)} bytes; its header alone takes {_HEADER.size}")
    if struct.unpack_from("<I", head)[0] != MAGIC:
        numbers = list(_HEADER.unpack_from(head))
        tied, numbers[5] = numbers[5] > 0, abs(numbers[5])
        config = _config(path, numbers, tied)
        start, parts = _HEADER.size, tuple(_legacy_parts(config))
    else:
        if len(head) < _HEADER_SIZE:
            raise CheckpointError(f"{path} has {len(head)} bytes; its header alone takes {_HEADER_SIZE}")
        version = struct.unpack_from("<i", head, 4)[0]
        if version not in (1, 2):
            raise CheckpointError(f"{path} is of llama2.c version {version}; supported: legacy, 1, 2")
        config = _config(path, list(_HEADER.unpack_from(head, 8)), bool(head[36]))
        group = struct.unpack_from("<i", head, 37)[0] if version == 2 else 0
        if version == 2 and (group < 1 or config.hidden % group):
            raise CheckpointError(f"{path}: group size {group}; supported: a divisor of {config.hidden}")
        start, parts = _HEADER_SIZE, tuple(_versioned_parts(config, group))
    expected = start + sum(part.nbytes for part in parts)
    if size != expected:
        raise CheckpointError(f"{path} has {size:,} bytes; its header asks for {expected:,}")
    return Llama2cFile(path, config, start, parts)


def _config(path: Path, numbers: list[int], tied: bool) -> ModelConfig:
    hidden, intermediate, layers, q_heads, kv_heads, vocab_size, max_position = numbers
    if q_heads < 1 or hidden % q_heads:
        raise CheckpointError(f"{path}: its header's dim {hidden} is not a multiple of its heads {q_heads}")
    try:
        return ModelConfig(
            architecture="llama",
            layers=layers,
            hidden=hidden,
            intermediate=intermediate,
            q_heads=q_heads,
            kv_heads=kv_heads,
            head_dim=hidden // q_heads,
            vocab_size=vocab_size,
            max_position=max_position,
            norm_eps=1e-5,
            tie_embeddings=tied,
            bos_token_id=1,
            eos_token_ids=(2,),
        )
    except CheckpointError as error:
        raise CheckpointError(f"{path}: its header's {error.message}") from error


def _matrices(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Each layer's matrices in the file's order."""
    c = config
    return {
        "self_attn.q_proj": (c.q_size, c.hidden),
        "self_attn.k_proj": (c.kv_size, c.hidden),
        "self_attn.v_proj": (c.kv_size, c.hidden),
        "self_attn.o_proj": (c.hidden, c.q_size),
        "mlp.gate_proj": (c.intermediate, c.hidden),
        "mlp.down_proj": (c.hidden, c.intermediate),
        "mlp.up_proj": (c.intermediate, c.hidden),
    }


def _every_layer(config: ModelConfig, name: str, shape: tuple[int, ...], group: int = 0) -> Iterator[_Part]:
    for layer in range(config.layers):
        yield _Part(f"model.layers.{layer}.{name}.weight", shape, group)


def _legacy_parts(config: ModelConfig) -> Iterator[_Part]:
    c = config
    matrices = list(_matrices(c).items())
    yield _Part("model.embed_tokens.weight", (c.vocab_size, c.hidden))
    yield from _every_layer(c, "input_layernorm", (c.hidden,))
    for name, shape in matrices[:4]:
        yield from _every_layer(c, name, shape)
    yield from _every_layer(c, "post_attention_layernorm", (c.hidden,))
    for name, shape in matrices[4:]:
        yield from _every_layer(c, name, shape)
    yield _Part("model.norm.weight", (c.hidden,))
    yield _Part(None, (c.max_position * c.head_dim,))  # cos and sin tables, half each
    if not c.tie_embeddings:
        yield _Part("lm_head.weight", (c.vocab_size, c.hidden))


def _versioned_parts(config: ModelConfig, group: int) -> Iterator[_Part]:
    c = config
    yield from _every_layer(c, "input_layernorm", (c.hidden,))
    yield from _every_layer(c, "post_attention_layernorm", (c.hidden,))
    yield _Part("model.norm.weight", (c.hidden,))
    yield _Part("model.embed_tokens.weight", (c.vocab_size, c.hidden), group)
    for name, shape in _matrices(c).items():
        yield from _every_layer(c, name, shape, group)
    if not c.tie_embeddings:
        yield _Part("lm_head.weight", (c.vocab_size, c.hidden), group)


def read_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """tokenizer.bin: the longest token's bytes, then a score, a length and the bytes of each token.

    It is sentencepiece's vocabulary with spaces in place of "▁": ids 0 to 2 are unknown, bos and eos,
    the next 256 are the bytes.

    Raises:
        TokenizerError: fewer tokens than the model has, or lengths that run past the end.
    """
    data = read_bytes(path, _TOKENIZER_LIMIT)
    pieces, at = [], 4
    for token in range(vocab_size):
        if at + 8 > len(data):
            raise TokenizerError(f"{path} ends after {token} tokens; its model has {vocab_size}")
        score, length = struct.unpack_from("<fi", data, at)
        text = data[at + 8 : at + 8 + length]
        if length < 0 or len(text) != length:
            raise TokenizerError(f"{path}: token {token} of {length} bytes runs past the end")
        at += 8 + length
        pieces.append((_piece(text, token, path), score, _kind(token)))
    vocabulary = sentencepiece.Vocabulary(pieces)
    backend = sentencepiece.build(vocabulary, path, add_bos=True)
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    return Tokenizer(backend, special=special, path=path, prefix_space=True)


def _kind(token: int) -> int:
    return 2 if token == 0 else 3 if token < 3 else 6 if token < 259 else 1


def _piece(text: bytes, token: int, path: Path) -> str:
    if token < 3:
        return ("<unk>", "<s>", "</s>")[token]
    if token < 259:
        return f"<0x{token - 3:02X}>"
    try:
        return text.decode().replace(" ", SPACE)
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path}: token {token} is no UTF-8: {error}") from error
