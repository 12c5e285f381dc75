"""sentencepiece's tokenizer.model (its BPE kind, as Llama 2 has it) → a tokenizer.

The file is one protocol-buffers message. Only its pieces, the kind of model and the normalizer's
switches matter, so the wire format (varints, fixed and length-delimited fields) is read by hand.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, processors

from strobe.checkpoints.bpe import merges
from strobe.checkpoints.files import read_bytes
from strobe.checkpoints.tokenizer import SPACE, Tokenizer
from strobe.errors import TokenizerError

LIMIT = 64 << 20
"""Bytes of the largest model file read."""

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_BPE = 2
_KINDS = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}


@dataclass
class Vocabulary:
    """Pieces `(text, score, kind)` by id; a higher score merges first."""

    pieces: list[tuple[str, float, int]] = field(default_factory=list)
    model_kind: int = 1
    prefix_space: bool = True
    """Whether a space is put before a text ("add_dummy_prefix")."""
    normalizes: bool = False
    """Whether characters are mapped or white space is removed."""
    bos_id: int = 1
    eos_id: int = 2


def read(path: Path, settings: Mapping[str, Any], template_path: Path | None = None) -> Tokenizer:
    """The tokenizer of a tokenizer.model. `settings` are a tokenizer_config.json's, where there is one.

    Raises:
        TokenizerError: not a whole file of this format, or not a BPE model.
    """
    data = read_bytes(path, LIMIT)
    try:
        vocabulary = _parse(data)
    except (ValueError, IndexError, struct.error) as error:
        raise TokenizerError(f"{path} is not a sentencepiece model: {error}") from error
    if vocabulary.model_kind != _BPE:
        kind = _KINDS.get(vocabulary.model_kind, str(vocabulary.model_kind))
        raise TokenizerError(f"{path} is a sentencepiece {kind} model; supported: bpe")
    if vocabulary.normalizes:
        raise TokenizerError(f"{path} normalises text; supported: models trained to keep text as it is")
    backend = build(vocabulary, path, add_bos=bool(settings.get("add_bos_token", True)))
    named = {
        role: vocabulary.pieces[token][0]
        for role, token in (("bos_token", vocabulary.bos_id), ("eos_token", vocabulary.eos_id))
        if 0 <= token < len(vocabulary.pieces)
    }
    return Tokenizer.with_settings(
        backend, path, {**named, **settings}, template_path, prefix_space=vocabulary.prefix_space
    )


def build(vocabulary: Vocabulary, path: Path, *, add_bos: bool) -> tokenizers.Tokenizer:
    """The `tokenizers` object that encodes as sentencepiece does, but for the space before a text."""
    ids: dict[str, int] = {}
    for token, (text, _, _) in enumerate(vocabulary.pieces):
        if ids.setdefault(text, token) != token:
            raise TokenizerError(f"{path}: pieces {ids[text]} and {token} are both {text!r}")
    unknown = [text for text, _, kind in vocabulary.pieces if kind == _UNKNOWN]
    if len(unknown) != 1:
        raise TokenizerError(f"{path} has {len(unknown)} unknown pieces; supported: 1")
    mergeable = {text: score for text, score, kind in vocabulary.pieces if kind == _NORMAL}
    ranked = sorted(mergeable, key=lambda text: (-mergeable[text], ids[text]))
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=ids,
            merges=merges(ranked, {text: ids[text] for text in ranked}, path),
            unk_token=unknown[0],
            fuse_unk=True,
            byte_fallback=any(kind == _BYTE for _, _, kind in vocabulary.pieces),
        )
    )
    backend.normalizer = normalizers.Replace(" ", SPACE)
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_special_tokens(
        [
            AddedToken(text, normalized=False, special=True)
            for text, _, kind in vocabulary.pieces
            if kind == _CONTROL
        ]
    )
    backend.add_tokens(
        [AddedToken(text, normalized=False) for text, _, kind in vocabulary.pieces if kind == _USER_DEFINED]
    )
    if add_bos and 0 <= vocabulary.bos_id < len(vocabulary.pieces):
        bos = vocabulary.pieces[vocabulary.bos_id][0]
        backend.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, vocabulary.bos_id)]
        )
    return backend


def _parse(data: bytes) -> Vocabulary:
    """ModelProto: 1 pieces, 2 trainer_spec, 3 normalizer_spec (sentencepiece_model.proto)."""
    found = Vocabulary()
    for number, value in _fields(data):
        if number == 1:
            piece = dict(_fields(_message(value)))
            text = _message(piece.get(1, b"")).decode()
            (score,) = struct.unpack("<f", _message(piece.get(2, bytes(4))))
            found.pieces.append((text, score, int(piece.get(3, _NORMAL))))
        elif number == 2:
            spec = dict(_fields(_message(value)))
            found.model_kind = int(spec.get(3, 1))
            found.bos_id, found.eos_id = (
                _signed(int(spec.get(key, default))) for key, default in ((41, 1), (42, 2))
            )
        elif number == 3:
            spec = dict(_fields(_message(value)))
            found.normalizes = bool(spec.get(2)) or bool(spec.get(4, 1))
            found.prefix_space = bool(spec.get(3, 1))
    if not found.pieces:
        raise ValueError("it has no pieces")
    return found


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """A message's fields `(number, value)`: an int for varints, bytes for the rest."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        wire = tag & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
        if at + size > len(data):
            raise ValueError(f"a field at byte {at} runs past the end")
        yield tag >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """`(value, where it ends)`."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError(f"a number of more than ten bytes at {at}")


def _message(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number where a message belongs")
    return value


def _signed(value: int) -> int:
    """An int32 field: negative numbers come as 64-bit two's complement."""
    return value - (1 << 64) if value >= 1 << 63 else value
