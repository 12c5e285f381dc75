"""Streamed text against the text of all tokens at once."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import decoders, models

from strobe.checkpoints.tokenizer import Tokenizer
from strobe.engine.detokenizer import Detokenizer


class Bytes:
    """A token is a byte."""

    def bytes_of(self, ids: Sequence[int]) -> bytes:
        return bytes(ids)

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


def sentencepiece_like() -> Tokenizer:
    """As Llama 2's: a word carries its space, which a text's first word loses; other bytes are tokens."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁a": 256, "b": 257, "▁": 258, "<s>": 259}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="b", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>"])
    return Tokenizer(backend)


def stream(detokenizer: Detokenizer, tokens: Sequence[int]) -> list[str]:
    parts = []
    for token in tokens:
        parts.append(detokenizer.push([token]))
        if detokenizer.stopped_by is not None:
            break
    return [*parts, detokenizer.finish()]


@given(st.text(max_size=60), st.text(max_size=20))
def test_whole_characters_only(text, prompt):
    parts = stream(Detokenizer(Bytes(), prompt.encode()), text.encode())
    assert "".join(parts) == text
    assert all("�" not in part for part in parts) or "�" in text


@given(st.lists(st.integers(0, 255), max_size=60))
def test_bytes_that_are_no_text_come_out_as_they_decode(tokens):
    assert "".join(stream(Detokenizer(Bytes(), []), tokens)) == Bytes().decode(tokens)


@given(st.binary(max_size=40))
def test_broken_bytes_are_not_held_for_ever(tokens):
    detokenizer = Detokenizer(Bytes(), [])
    told = "".join(detokenizer.push([token]) for token in tokens)
    assert len(Bytes().decode(list(tokens))) - len(told) <= 3


TOKENIZER = sentencepiece_like()


@example(prompt=[259], text=[258, 258, 257])
@given(prompt=st.lists(st.integers(256, 259), max_size=12), text=st.lists(st.integers(0, 259), max_size=30))
def test_text_goes_on_from_the_prompt(prompt, text):
    whole, before = TOKENIZER.decode([*prompt, *text]), TOKENIZER.decode(prompt)
    assert before + "".join(stream(Detokenizer(TOKENIZER, prompt), text)) == whole
    at_once = Detokenizer(TOKENIZER, prompt)
    assert before + at_once.push(text) + at_once.finish() == whole


@given(
    text=st.text(alphabet="ab", max_size=40),
    stop=st.lists(st.text(alphabet="ab", min_size=1, max_size=5), min_size=1, max_size=3),
    size=st.integers(1, 4),
)
def test_stop_strings(text, stop, size):
    detokenizer = Detokenizer(Bytes(), [], stop)
    parts = []
    for start in range(0, len(text), size):
        parts.append(detokenizer.push(text[start : start + size].encode()))
        assert not any(s in "".join(parts) for s in stop), "part of a stop string got out"
        if detokenizer.stopped_by is not None:
            break
    parts.append(detokenizer.finish())
    ends = [text.index(s) for s in stop if s in text]
    if ends and size == 1:  # with more at once, a longer stop string that began earlier may win
        first_whole = min(text.index(s) + len(s) for s in stop if s in text)
        wanted = min(text.index(s) for s in stop if s in text[:first_whole])
        assert "".join(parts) == text[:wanted]
        assert detokenizer.stopped_by in stop
    elif not ends:
        assert "".join(parts) == text
        assert detokenizer.stopped_by is None


def test_stop_string_over_many_tokens_is_held_back_until_it_is_sure():
    detokenizer = Detokenizer(Bytes(), [], ["END"])
    assert [detokenizer.push(c.encode()) for c in "xEN!EN"] == ["x", "", "", "EN!", "", ""]
    assert detokenizer.push(b"D") == ""
    assert detokenizer.stopped_by == "END"
    assert detokenizer.finish() == ""


def test_long_stop_strings_cost_a_look_a_character():
    """A client may send 64 of 1024 characters, and see to it that one of them is always nearly there."""
    stop = ["a" * 900 + "b", *(chr(ord("c") + index) * 1024 for index in range(20)), "a" * 1000]
    detokenizer, looks = Detokenizer(Bytes(), [], stop), 0

    def count(frame, event, function):
        nonlocal looks
        looks += event == "c_call" and function.__name__ == "endswith"

    tokens = [b"a" * 3] * 333
    sys.setprofile(count)
    try:
        told = "".join(detokenizer.push(token) for token in tokens)
    finally:
        sys.setprofile(None)
    assert (told, detokenizer.stopped_by) == ("", None)
    assert looks <= 2 * len(stop) * 999
    assert detokenizer.push(b"a") == ""
    assert detokenizer.stopped_by == stop[-1]


@pytest.mark.parametrize("unfinished", [b"\xe2", b"\xe2\x82", b"\xf0\x9f\x98"])
def test_an_unfinished_character_at_the_end_is_told_as_such(unfinished):
    parts = stream(Detokenizer(Bytes(), []), b"ok" + unfinished)
    assert parts[:-1] == ["o", "k", *[""] * len(unfinished)]
    assert set(parts[-1]) == {"�"}
