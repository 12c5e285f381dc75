"""Tokens to text while they come: never half a character, never part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

REPLACEMENT = "�"
CONTEXT_TOKENS = 6
"""Tokens before the new ones that are decoded with them: decoders treat the first token of a text apart."""
LONGEST_CUT = 3
"""Bytes that an unfinished UTF-8 character can have, hence replacement signs it can show as."""


class Decoder(Protocol):
    """What is asked of a tokenizer here."""

    def decode(self, token_ids: Sequence[int], /) -> str: ...


class Detokenizer:
    """The text of one sequence.

    Decoding is not a homomorphism: a character may span tokens, and a first token may lose its space.
    So new tokens are decoded with a few before them, and what that adds to the text of those is new.
    Text is held back while it may be the start of a character, or of one of the `stop` strings.
    `prompt_tail` are the last tokens of the prompt: the text goes on where the prompt ends.
    """

    def __init__(self, tokenizer: Decoder, prompt_tail: Sequence[int], stop: Sequence[str] = ()) -> None:
        self.stopped_by: str | None = None
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._window = list(prompt_tail[-CONTEXT_TOKENS:])
        self._settled = tokenizer.decode(self._window).rstrip(REPLACEMENT) if self._window else ""
        self._pending = ""

    def push(self, token_ids: Sequence[int], *, stops: bool = True) -> str:
        """Text that these tokens settle. After a stop string (`stopped_by`) there is no more.

        With `stops` False they are looked for only in the text after this.
        """
        self._window.extend(token_ids)
        text = self._tokenizer.decode(self._window)
        cut = len(text) - len(text.rstrip(REPLACEMENT))
        if cut == 0:
            new = self._take(text)
            if len(self._window) > 2 * CONTEXT_TOKENS:
                self._window = self._window[-CONTEXT_TOKENS:]
                self._settled = self._tokenizer.decode(self._window)
        elif cut > LONGEST_CUT:
            new = self._take(text[: len(text) - LONGEST_CUT])
        else:
            new = self._take(text[: len(text) - cut])
        return self._release(new, stops)

    def finish(self) -> str:
        """What was held back: the text is over."""
        if self.stopped_by is not None:
            return ""
        text = self._tokenizer.decode(self._window)
        rest = self._release(text[len(self._settled) :], True)
        if self.stopped_by is None:
            rest += self._pending
        self._pending = ""
        self._settled = text
        return rest

    def _take(self, text: str) -> str:
        new = text[len(self._settled) :]
        self._settled = max(self._settled, text, key=len)
        return new

    def _release(self, new: str, stops: bool) -> str:
        if not self._stop:
            return new
        text = self._pending + new
        if not stops:
            self._pending = ""
            return text
        found = [(text.index(stop), stop) for stop in self._stop if stop in text]
        if found:
            end, self.stopped_by = min(found, key=lambda match: (match[0], -len(match[1])))
            self._pending = ""
            return text[:end]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._pending = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
