"""Constrained output by llguidance: schemas, regexes and choices compiled off the event loop."""

from __future__ import annotations

import asyncio
import json
import re
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from hashlib import blake2b
from typing import Any

import numpy as np

from strobe.checkpoints.tokenizer import Tokenizer
from strobe.errors import MissingExtraError
from strobe.server.errors import ApiError

COMPILE_S = 5.0
"""Longest that a client's grammar may take to compile."""
CACHED = 64
"""Compiled grammars that are kept."""
_WHITESPACE = {"schema": r"\n?[ ]{0,8}", "compact schema": "[ ]?"}
"""Between the parts of a JSON text: a model that likes blanks must not write them for ever."""


class LlgGrammar:
    """A compiled grammar; see `strobe.engine.grammar`."""

    def __init__(self, start: Any) -> None:
        self._start = start

    def matcher(self) -> LlgMatcher:
        return LlgMatcher(self._start.deep_copy())


class LlgMatcher:
    """One sequence's place in a grammar. Its work a token is bounded by llguidance's own limits."""

    def __init__(self, state: Any) -> None:
        self._state = state

    @property
    def finished(self) -> bool:
        return self._state.is_stopped()

    @property
    def failed(self) -> bool:
        return self._state.is_error()

    def allowed(self) -> np.ndarray:
        bits = np.frombuffer(self._state.compute_bitmask(), dtype=np.uint8)
        allowed = np.unpackbits(bits, bitorder="little").view(bool)
        if not allowed.any():  # it has failed, and says so after the next token
            allowed = np.ones_like(allowed)
        return allowed

    def accept(self, token_id: int) -> None:
        self._state.consume_token(token_id)


class Grammars:
    """Compiles for one tokenizer, and keeps what it compiled last."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_ids = list(eos_ids)
        self._threads = ThreadPoolExecutor(2, "strobe-grammar")
        self._kept: OrderedDict[bytes, LlgGrammar] = OrderedDict()

    async def json_schema(self, schema: dict[str, Any], param: str, *, compact: bool = False) -> LlgGrammar:
        """A text that is JSON of this schema, on one line where it is `compact`.

        Raises:
            ApiError: 400 where the schema cannot be kept to.
        """
        return await self._get("compact schema" if compact else "schema", json.dumps(schema), param)

    async def regex(self, pattern: str, param: str) -> LlgGrammar:
        """A text that the regex matches as a whole."""
        return await self._get("regex", pattern, param)

    async def choice(self, texts: Sequence[str], param: str) -> LlgGrammar:
        """One of these texts."""
        return await self._get("regex", "|".join(f"(?:{re.escape(text)})" for text in texts), param)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _get(self, kind: str, source: str, param: str) -> LlgGrammar:
        key = blake2b(f"{kind}:{source}".encode("utf-8", "surrogatepass")).digest()  # sources may be large
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        if not self._eos_ids:
            raise ApiError(400, f"{param}: this model has no token that ends a text", param=param)
        work = asyncio.get_running_loop().run_in_executor(self._threads, self._compile, kind, source)
        try:
            state, fault = await asyncio.wait_for(work, COMPILE_S)
        except asyncio.TimeoutError:
            raise ApiError(
                400,
                f"{param}: takes more than {COMPILE_S:g} s to compile",
                param=param,
                code="grammar_timeout",
            ) from None
        if fault is not None:
            raise ApiError(400, f"{param}: {fault}", param=param, code="invalid_grammar")
        grammar = self._kept[key] = LlgGrammar(state)
        while len(self._kept) > CACHED:
            self._kept.popitem(last=False)
        return grammar

    def _compile(self, kind: str, source: str) -> tuple[Any, str | None]:
        """A matcher, and what is wrong with the grammar."""
        matcher = self._library.LLMatcher
        try:
            if kind in _WHITESPACE:
                overrides = {"whitespace_pattern": _WHITESPACE[kind]}
                text = matcher.grammar_from_json_schema(source, overrides=overrides)
            else:
                text = matcher.grammar_from_regex(source)
            limits = self._library.LLParserLimits(verbose_errors=False)
            state = matcher(self._vocabulary, text, log_level=0, limits=limits)
        except ValueError:
            return None, f"not a {kind} that can be compiled"
        if state.is_error():
            return None, _fault(state.get_error())
        return state, None

    @cached_property
    def _library(self) -> Any:
        try:
            import llguidance
        except ImportError as error:
            raise MissingExtraError.of("llguidance", "server") from error
        return llguidance

    @cached_property
    def _vocabulary(self) -> Any:
        return self._library.LLTokenizer(
            self._library.TokenizerWrapper(_Vocabulary(self._tokenizer, self._vocab_size, self._eos_ids)),
            eos_token=self._eos_ids,
        )


class _Vocabulary:
    """A tokenizer as llguidance wants to see it."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Sequence[int]) -> None:
        special = tokenizer.special_ids
        self.tokens = [tokenizer.token_bytes(token) for token in range(vocab_size)]
        self.special_token_ids = sorted(token for token in special if token < vocab_size)
        self.bos_token_id = tokenizer.bos_id
        self.eos_token_id = eos_ids[0]
        self._encode = tokenizer.encode

    def __call__(self, text: str | bytes) -> list[int]:
        if isinstance(text, bytes):
            text = text.decode("utf-8", "replace")
        return self._encode(text, add_special=False)


def _fault(told: str) -> str:
    """Of llguidance's report the line that says what is wrong; its limits are not the client's to raise."""
    if "limits." in told:
        return "too complex to compile"
    lines = told.strip().splitlines() or ["not a grammar"]
    named = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (named or lines)[0][:200]
