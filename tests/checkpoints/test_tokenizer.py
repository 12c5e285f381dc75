"""Tokenizers of every kind against the libraries they come from: sentencepiece, tiktoken, transformers."""

from __future__ import annotations

import base64
import io
import json
import random
import re
import struct
import threading
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
import tokenizers
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from strobe.checkpoints import llama2c
from strobe.checkpoints import sentencepiece as our_sentencepiece
from strobe.checkpoints import tiktoken as our_tiktoken
from strobe.checkpoints.tokenizer import Tokenizer
from strobe.errors import RequestError

LINES = """
    the of and to in is that king queen thou art my lord what say you never more night day love death
    aaa aaaa abab it's don't we'll I'd 3 14 159 2653 don't! -- (yes) [no] {maybe} x=y+1; /* code */
    naïve café Ångström Straße привет мир 你好 世界 こんにちは 🙂 🤖👍
"""
WORDS = [*LINES.split(), "\t", "\n\n"]


def corpus(lines: int = 600) -> list[str]:
    rng = random.Random(7)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 14))) for _ in range(lines)]


TEXTS = st.one_of(
    st.lists(st.sampled_from([*WORDS, "  ", "\r\n", "a" * 9, "zq"]), max_size=20).map(" ".join),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
    st.text("a \n'sIt1 9.é你🙂", max_size=40),
)


def train_sentencepiece(**options: object) -> bytes:
    """A small BPE model as Llama 2's: byte fallback, no normalisation, a space before the first word."""
    stream = io.BytesIO()
    given = {
        "vocab_size": 520,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
        "character_coverage": 0.99,
        "minloglevel": 2,
        **options,
    }
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(corpus()), model_writer=stream, **given)
    return stream.getvalue()


def train_ranks(most: int) -> dict[bytes, int]:
    """Byte-pair ranks by the textbook: merge the most frequent pair, up to `most` tokens."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    words = Counter(word for line in corpus() for word in re.findall(r" ?\S+|\s+", line))
    pieces = {word: [bytes([byte]) for byte in word.encode()] for word in words}
    while len(ranks) < most:
        pairs: Counter[bytes] = Counter()
        for word, parts in pieces.items():
            for left, right in pairwise(parts):
                pairs[left + right] += words[word]
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        ranks[best] = len(ranks)
        for word, parts in pieces.items():
            merged: list[bytes] = []
            for part in parts:
                if merged and merged[-1] + part == best:
                    merged[-1] = best
                else:
                    merged.append(part)
            pieces[word] = merged
    return ranks


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model"
    path.write_bytes(train_sentencepiece(user_defined_symbols=["<mark>"]))
    return path


@pytest.fixture(scope="module")
def sentencepiece_pair(sentencepiece_model: Path) -> tuple[Tokenizer, sentencepiece.SentencePieceProcessor]:
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    return our_sentencepiece.read(sentencepiece_model, {}), theirs


@given(text=TEXTS)
def test_sentencepiece(sentencepiece_pair, text):
    ours, theirs = sentencepiece_pair
    text = text.replace("\0", "")  # sentencepiece ends a text there
    ids = theirs.encode(text)
    assert ours.encode(text, add_special=False) == ids
    assert ours.encode(text) == [theirs.bos_id(), *ids]
    assert ours.decode(ids) == theirs.decode(ids) == text.replace("▁", " ")


@given(ids=st.lists(st.integers(3, 519), max_size=12))
def test_sentencepiece_decodes_any_ids(sentencepiece_pair, ids):
    """Up to how many signs stand for broken UTF-8, and a space that a byte token spells."""
    ours, theirs = sentencepiece_pair
    given, expected = (
        text.replace("\ufffd", "").lstrip(" ") for text in (ours.decode(ids), theirs.decode(ids))
    )
    assert given == expected


def test_control_tokens_in_a_text_are_tokens(sentencepiece_pair):
    ours, theirs = sentencepiece_pair
    assert ours.encode("</s>the", add_special=False)[0] == theirs.eos_id()
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_id(), theirs.eos_id())


@given(text=TEXTS)
def test_llama2c_tokenizer(llama2c_pair, text):
    ours, theirs = llama2c_pair
    text = text.replace("\0", "").replace("<mark>", "")
    assert ours.encode(text) == [1, *theirs.encode(text)]
    assert ours.decode(ours.encode(text)) == text.replace("▁", " ")


@pytest.fixture(scope="module")
def llama2c_pair(tmp_path_factory: pytest.TempPathFactory):
    """A tokenizer.bin as llama2.c's exporter writes it, from a model without symbols of its own."""
    model = train_sentencepiece()
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokens = []
    for token in range(theirs.vocab_size()):
        piece = {1: "\n<s>\n", 2: "\n</s>\n"}.get(token, theirs.id_to_piece(token)).replace("▁", " ")
        tokens.append((piece.encode(), theirs.get_score(token)))
    path = tmp_path_factory.mktemp("llama2c") / "tokenizer.bin"
    with path.open("wb") as file:
        file.write(struct.pack("<I", max(len(piece) for piece, _ in tokens)))
        for piece, score in tokens:
            file.write(struct.pack("<fI", score, len(piece)) + piece)
    return llama2c.read_tokenizer(path, len(tokens)), theirs


@pytest.fixture(scope="module")
def byte_level() -> tokenizers.Tokenizer:
    """A small byte-level BPE as GPT-2's, trained here."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|end|>", "<|user|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(corpus(), trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
    )
    return backend


@pytest.fixture(scope="module")
def tiktoken_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, tiktoken.Encoding]:
    """A rank file in Llama 3's format, and tiktoken itself with the same ranks."""
    ranks = train_ranks(700)
    path = tmp_path_factory.mktemp("tiktoken") / "tokenizer.model"
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
    special = our_tiktoken.special_tokens(256)
    theirs = tiktoken.Encoding(
        "small",
        pat_str=our_tiktoken.SPLIT,
        mergeable_ranks=ranks,
        special_tokens={token: len(ranks) + i for i, token in enumerate(special)},
    )
    return our_tiktoken.read(path, len(ranks) + 256), theirs


@given(text=TEXTS)
def test_tiktoken(tiktoken_pair, text):
    ours, theirs = tiktoken_pair
    ids = theirs.encode(text, allowed_special="all")
    assert ours.encode(text, add_special=False) == ids
    assert ours.encode(text) == [ours.bos_id, *ids]
    assert ours.decode(ids) == text


@given(ids=st.lists(st.integers(0, 399), max_size=12))
def test_tiktoken_decodes_any_ids(tiktoken_pair, ids):
    ours, theirs = tiktoken_pair
    assert ours.decode(ids) == theirs.decode(ids, errors="replace")
    assert [ours.token_bytes(token) for token in ids] == theirs.decode_tokens_bytes(ids)


def test_llama3_special_tokens(tiktoken_pair):
    """Their numbers as Llama 3.1 has them, after 128,000 ranks."""
    ours, theirs = tiktoken_pair
    first = theirs.n_vocab - 256
    names = our_tiktoken.special_tokens(256)
    assert names[0] == "<|begin_of_text|>"
    assert names[6:10] == ["<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"]
    assert names[255] == "<|reserved_special_token_247|>"
    assert ours.encode("<|eot_id|>", add_special=False) == [first + 9]
    assert ours.stop_ids == (first + 1, first + 9)
    assert ours.decode([first + 9, *ours.encode("my lord", add_special=False)]) == "my lord"


def test_huggingface_against_transformers(tmp_path_factory, byte_level):
    folder = tmp_path_factory.mktemp("byte-level")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=byte_level, bos_token="<|begin|>", eos_token="<|end|>"
    )
    theirs.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    ours = Tokenizer.from_json(folder / "tokenizer.json", settings)
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    rng = random.Random()
    for _ in range(200):
        text = " ".join(rng.choices([*WORDS, "<|user|>", "  "], k=12))
        ids = ours.encode(text)
        assert ids == theirs(text)["input_ids"]
        for skip in (True, False):
            assert ours.decode(ids, skip_special=skip) == theirs.decode(
                ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False
            )


def test_sentencepiece_tokenizer_json(sentencepiece_pair):
    """The same vocabulary as a tokenizer.json decodes by its own parts."""
    reference, _ = sentencepiece_pair
    text = json.loads(reference._backend.to_str())
    text["normalizer"] = {
        "type": "Sequence",
        "normalizers": [{"type": "Prepend", "prepend": "▁"}, text["normalizer"]],
    }
    text["decoder"]["decoders"].append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    theirs = tokenizers.Tokenizer.from_str(json.dumps(text))
    ours = Tokenizer(theirs)
    for line in corpus(100):
        assert ours.decode(ours.encode(line)) == theirs.decode(theirs.encode(line).ids) == line


@given(text=TEXTS)
def test_bytes_of_tokens_are_bytes_of_text(byte_level, text):
    ours = Tokenizer(byte_level)
    ids = ours.encode(text, add_special=False)
    assert b"".join(map(ours.token_bytes, ids)) == text.encode()


def test_ids_that_no_token_has_are_silent(byte_level):
    ours = Tokenizer(byte_level)
    assert ours.vocab_size == byte_level.get_vocab_size()
    assert ours.decode([ours.vocab_size, 10**6, -100, 1 << 40]) == ""
    ours.decode(range(ours.vocab_size + 5000))
    assert len(ours._bytes) <= ours.vocab_size, "ids that a client makes up are not kept"


def test_other_threads_run_while_a_long_text_is_encoded(byte_level):
    """Else a client's text of two million characters would keep a server's event loop for seconds."""
    ours, done, turns = Tokenizer(byte_level), threading.Event(), 0

    def work():
        ours.encode("zq" * 200_000)
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    while not done.wait(0.001):
        turns += 1
    thread.join()
    assert turns > 10


def test_lone_surrogates_are_the_prompt_s_fault(byte_level):
    with pytest.raises(RequestError, match="surrogate"):
        Tokenizer(byte_level).encode("a\ud800")
