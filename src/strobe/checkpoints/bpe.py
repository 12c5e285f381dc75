"""Byte-pair encodings given as a list of tokens, for a library that wants a list of merges.

A vocabulary of ranked tokens merges, at each step, the two neighbours whose joined text is the token
of the best rank. As merges that is: every way to cut every token into two tokens, in the tokens' order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import AnyStr


def merges(tokens: Iterable[AnyStr], vocabulary: Mapping[AnyStr, int]) -> list[tuple[AnyStr, AnyStr]]:
    """All cuts of `tokens` (best rank first) into two members of `vocabulary`."""
    return [
        (token[:cut], token[cut:])
        for token in tokens
        # A longer left part first: where two cuts compete for the same text, it is the leftmost pair.
        for cut in range(len(token) - 1, 0, -1)
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
