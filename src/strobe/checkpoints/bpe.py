"""Byte-pair encodings given as a list of tokens, for a library that wants a list of merges.

A vocabulary of ranked tokens merges, at each step, the two neighbours whose joined text is the token
of the best rank. As merges that is: every way to cut every token into two tokens, in the tokens' order.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from strobe.errors import TokenizerError

LONGEST = 1024
"""Characters of a token, of which every cut is looked at. Llama 3's longest has 128."""


def merges(tokens: Collection[str], vocabulary: Mapping[str, int], path: Path) -> list[tuple[str, str]]:
    """All cuts of `tokens` (best rank first) into two members of `vocabulary`.

    Raises:
        TokenizerError: a token too long, in the file `path`.
    """
    longest = max(map(len, tokens), default=0)
    if longest > LONGEST:
        raise TokenizerError(f"{path} has a token of {longest:,} characters; supported: up to {LONGEST:,}")
    return [
        (token[:cut], token[cut:])
        for token in tokens
        # A longer left part first: where two cuts compete for the same text, it is the leftmost pair.
        for cut in range(len(token) - 1, 0, -1)
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
