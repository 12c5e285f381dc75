"""Meta's tiktoken-style tokenizer.model (Llama 3): a line `base64(token) rank` each → a tokenizer."""

from __future__ import annotations

import base64
import binascii
import re
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from strobe.checkpoints.bpe import merges
from strobe.checkpoints.files import read_bytes
from strobe.checkpoints.tokenizer import Tokenizer, byte_characters
from strobe.errors import TokenizerError

LIMIT = 64 << 20
"""Bytes of the largest rank file read."""

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)
"""How Llama 3 cuts a text before it merges: contractions, words, up to three digits, signs, white space."""

_NAMED = {
    0: "begin_of_text",
    1: "end_of_text",
    4: "finetune_right_pad_id",
    6: "start_header_id",
    7: "end_header_id",
    8: "eom_id",
    9: "eot_id",
    10: "python_tag",
}
_LINE = re.compile(rb"([A-Za-z0-9+/]+={0,2}) (\d{1,9})")


def is_rank_file(head: bytes) -> bool:
    """True where a file that begins so is of this format, and not sentencepiece's."""
    return _LINE.fullmatch(head.split(b"\n", 1)[0].strip()) is not None


def special_tokens(count: int) -> list[str]:
    """Llama 3's special tokens by id, from the first after the ranks: those in use, and numbered spares."""
    spare = iter(range(count))
    return [f"<|{_NAMED.get(i) or f'reserved_special_token_{next(spare)}'}|>" for i in range(count)]


def read(path: Path, vocab_size: int | None) -> Tokenizer:
    """The tokenizer of a rank file. The model's ids past the ranks are special tokens (256 where None).

    Raises:
        TokenizerError: not a file of this format, or more ranks than ids.
    """
    ranks = _ranks(path)
    count = 256 if vocab_size is None else vocab_size - len(ranks)
    if count < 2:
        raise TokenizerError(
            f"{path} has {len(ranks)} tokens; its model's {vocab_size} ids leave no special ones"
        )
    spelling = byte_characters()
    spelled = ["".join(spelling[byte] for byte in token) for token in ranks]
    vocabulary = {token: rank for rank, token in enumerate(spelled)}
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges(spelled, vocabulary, path), ignore_merges=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    special = special_tokens(count)
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    bos = special[0]
    backend.post_processor = processors.TemplateProcessing(
        single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, len(ranks))]
    )
    roles = {"bos_token": bos, "eos_token": special[1]}
    if (turn_ends := "<|eot_id|>") in special:
        roles["eot_token"] = turn_ends
    return Tokenizer(backend, special=roles, path=path)


def _ranks(path: Path) -> list[bytes]:
    """The tokens by rank, every byte among them."""
    found: dict[int, bytes] = {}
    for number, line in enumerate(read_bytes(path, LIMIT).splitlines(), start=1):
        if not line:
            continue
        match = _LINE.fullmatch(line)
        try:
            token = base64.b64decode(match[1], validate=True) if match else b""
        except binascii.Error:
            token = b""
        if not match or not token:
            raise TokenizerError(f"{path}, line {number}: not a base64 token and its rank")
        found[int(match[2])] = token
    tokens = [found[rank] for rank in sorted(found)]
    if sorted(found) != list(range(len(found))) or len(set(tokens)) != len(tokens):
        raise TokenizerError(f"{path}: its ranks are not 0, 1, 2, ..., each with a token of its own")
    known = set(tokens)
    if missing := [byte for byte in range(256) if bytes([byte]) not in known]:
        raise TokenizerError(f"{path} has no token for the byte 0x{missing[0]:02x}")
    return tokens
