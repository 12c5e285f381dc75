"""Tokens to text while they come: never half a character, never part of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol


class Decoder(Protocol):
    """What is asked of a tokenizer here: tokens are bytes, and a text's first word may lose its space."""

    def bytes_of(self, ids: Sequence[int], /) -> bytes: ...

    def decode(self, ids: Sequence[int], /) -> str: ...


class Detokenizer:
    """The text of one sequence, which goes on from `prompt`.

    Text is held back while it may be the start of a character, or of one of the `stop` strings. Bytes
    that are no UTF-8 come out as U+FFFD.
    """

    def __init__(self, tokenizer: Decoder, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self.stopped_by: str | None = None
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._begun = [0] * len(self._stop)
        """How much of each stop string the held text ends with."""
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._begins = not any(tokenizer.bytes_of((token,)) for token in reversed(prompt))
        self._held = ""

    def push(self, token_ids: Sequence[int], *, stops: bool = True) -> str:
        """Text that these tokens settle. After a stop string (`stopped_by`) there is no more.

        With `stops` False they are looked for only in the text after this.
        """
        data = self._tokenizer.bytes_of(token_ids)
        text = self._utf8.decode(data)
        if self._begins and data:
            self._begins = False
            if text.startswith(" ") and self._tokenizer.decode(token_ids) != data.decode("utf-8", "replace"):
                text = text[1:]
        return self._release(text, stops)

    def finish(self) -> str:
        """What was held back: the text is over."""
        if self.stopped_by is not None:
            return ""
        text = self._release(self._utf8.decode(b"", final=True), True)
        if self.stopped_by is None:
            text += self._held
        self._held = ""
        return text

    def _release(self, text: str, stops: bool) -> str:
        """The part of `text`, after what is held, that no stop string can still claim."""
        if not self._stop:
            return text
        new, text, self._held = len(text), self._held + text, ""
        if not stops:
            self._begun = [0] * len(self._stop)
            return text
        # what was held has no whole stop string in it: one that is found ends in the new text
        places = ((text.find(stop, max(0, len(text) - new - len(stop) + 1)), stop) for stop in self._stop)
        if found := [place for place in places if place[0] >= 0]:
            end, self.stopped_by = min(found, key=lambda match: (match[0], -len(match[1])))
            return text[:end]
        self._begun = [
            _begun(text, stop, begun + new) for stop, begun in zip(self._stop, self._begun, strict=True)
        ]
        end = len(text) - max(self._begun)
        self._held = text[end:]
        return text[:end]


def _begun(text: str, stop: str, most: int) -> int:
    """Length of the longest end of `text` that `stop` begins with, known to be no longer than `most`.

    What one call looks through in vain the next ones need not: over a text that is a look a character.
    """
    for length in range(min(most, len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
