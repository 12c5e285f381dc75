"""Text to token ids and back, over the `tokenizers` library.

Byte-level vocabularies (GPT-2, Llama 3, Qwen) spell each byte as a printable character; sentencepiece
ones (Llama 2, Mistral) write a space as "▁" and spell bytes they have no piece for as "<0x0A>".
Decoding goes by way of bytes in both, so that any run of tokens has one text: that of its bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from strobe.checkpoints.chat import ChatTemplate, Message
from strobe.checkpoints.files import JSON_LIMIT, read_bytes
from strobe.errors import RequestError, TokenizerError

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
SPACE = "▁"


def byte_characters() -> list[str]:
    """The character that spells each byte in a byte-level vocabulary (Radford et al. 2019, section 2.2).

    Bytes that print in Latin-1 stand for themselves; the others take the characters from 256 on.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


class Tokenizer:
    """One checkpoint's tokenizer.

    `special` names its special tokens by role ("bos_token", "eos_token", ...), as chat templates do.
    `prefix_space` puts a space before a text that does not begin with a special token, and takes it
    off in `decode`; a tokenizer.json says in its own parts whether it does.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special: Mapping[str, str] | None = None,
        chat_template: ChatTemplate | None = None,
        path: Path | None = None,
        prefix_space: bool = False,
    ) -> None:
        self.special = dict(special or {})
        self.chat_template = chat_template
        self.path = path
        self._backend = backend
        self._added = backend.get_added_tokens_decoder()
        self._special_ids = frozenset(i for i, token in self._added.items() if token.special)
        self._bytes: dict[int, bytes] = {}
        parts = _parts(backend.decoder) or _parts(backend.pre_tokenizer)
        kinds = {str(part["type"]) for part in parts}
        self._byte_level = "ByteLevel" in kinds
        if not self._byte_level and not kinds & {"ByteFallback", "Metaspace"}:
            raise TokenizerError(
                f"{path or 'tokenizer'} decodes by {', '.join(sorted(kinds)) or 'nothing'}; "
                "supported: ByteLevel, ByteFallback, Metaspace"
            )
        self._prefix_space = prefix_space
        self._strips_space = prefix_space or any(map(_strips_space, parts))
        self._special_texts = tuple(self._added[token].content for token in self._special_ids)

    @classmethod
    def from_json(
        cls, path: Path, settings: Mapping[str, Any], template_path: Path | None = None
    ) -> Tokenizer:
        """A tokenizer.json, with its tokenizer_config.json's `settings` and perhaps a chat_template.jinja.

        Raises:
            TokenizerError: broken, or of a kind that cannot be decoded by bytes.
        """
        text = read_bytes(path, JSON_LIMIT)
        try:
            backend = tokenizers.Tokenizer.from_str(text.decode())
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # bare Exception for what the library dislikes, and panics of its own
            raise TokenizerError(f"{path} is not a tokenizer: {error}") from error
        for part in _parts(backend.post_processor):
            unknown = _undefined(part) if part["type"] == "TemplateProcessing" else None
            if unknown is not None:  # the library would panic with the first text
                raise TokenizerError(f"{path}: its post_processor adds {unknown!r}, which it does not define")
        return cls.with_settings(backend, path, settings, template_path)

    @classmethod
    def with_settings(
        cls,
        backend: tokenizers.Tokenizer,
        path: Path,
        settings: Mapping[str, Any],
        template_path: Path | None = None,
        *,
        prefix_space: bool = False,
    ) -> Tokenizer:
        """A tokenizer with the special tokens and the chat template that a tokenizer_config.json gives it."""
        special = {}
        for role, token in settings.items():
            content = token.get("content") if isinstance(token, dict) else token
            if role.endswith("_token") and isinstance(content, str):
                special[role] = content
        return cls(
            backend,
            special=special,
            chat_template=ChatTemplate.find(settings, path.parent / "tokenizer_config.json", template_path),
            path=path,
            prefix_space=prefix_space,
        )

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def special_ids(self) -> frozenset[int]:
        """Tokens that stand for no text, as bos and eos."""
        return self._special_ids

    @cached_property
    def bos_id(self) -> int | None:
        return self._id("bos_token")

    @cached_property
    def eos_id(self) -> int | None:
        return self._id("eos_token")

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens that end a text, or a turn of a conversation."""
        found = (self._id("eos_token"), self._id("eot_token"))
        return tuple(token for token in found if token is not None)

    def _id(self, role: str) -> int | None:
        token = self.special.get(role)
        return None if token is None else self._backend.token_to_id(token)

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Token ids of a text; `add_special` adds what the checkpoint puts around a text (mostly bos).

        Raises:
            RequestError: not a text, or one that is no Unicode.
        """
        if not isinstance(text, str):
            raise RequestError(f"the text is a {type(text).__name__}; supported: str")
        if self._prefix_space and text and not text.startswith(self._special_texts):
            text = " " + text
        try:
            # of the library's calls the one that lets other threads run meanwhile: a long text takes seconds
            (encoded,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special)
            return encoded.ids
        except TypeError as error:  # a str that has no UTF-8
            raise RequestError(
                "the text holds half a surrogate pair, which is no character", hint="is the input UTF-8?"
            ) from error

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of token ids: without special tokens, and with U+FFFD for what is no UTF-8.

        A sentencepiece vocabulary puts a space before the first word of a text; it is taken off again.
        """
        text = self.bytes_of(ids, skip_special).decode("utf-8", errors="replace")
        return text[1:] if self._strips_space and text.startswith(" ") else text

    def bytes_of(self, ids: Sequence[int], skip_special: bool = True) -> bytes:
        """The bytes of token ids laid end to end, as they come: whole characters only where the text is."""
        skipped = self._special_ids if skip_special else frozenset()
        return b"".join([self.token_bytes(token) for token in ids if token not in skipped])

    def token_bytes(self, token_id: int) -> bytes:
        """What one token stands for; nothing for an id that the vocabulary has no token for."""
        found = self._bytes.get(token_id)
        if found is None:
            token = self._backend.id_to_token(token_id) if 0 <= token_id < 1 << 32 else None
            if token is None:  # not kept: a client may make up any number of them
                return b""
            found = self._bytes[token_id] = self._spell(token_id, token)
        return found

    def _spell(self, token_id: int, token: str) -> bytes:
        if token_id in self._added:
            return token.encode()
        if self._byte_level:
            return b"".join(self._byte_of.get(character, character.encode()) for character in token)
        if spelled := _BYTE_PIECE.fullmatch(token):
            return bytes([int(spelled[1], 16)])
        return token.replace(SPACE, " ").encode()

    @cached_property
    def _byte_of(self) -> dict[str, bytes]:
        return {character: bytes([byte]) for byte, character in enumerate(byte_characters())}

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        /,
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """A conversation as the text that the model was trained on; encode it with `add_special=False`.

        `variables` of any name are the template's own, such as Qwen3's enable_thinking.

        Raises:
            RequestError: the checkpoint brings no template, or its template refuses these messages.
        """
        if self.chat_template is None:
            raise RequestError(
                f"{self.path or 'this tokenizer'} brings no chat template",
                hint="give a plain prompt, or a checkpoint that was trained to chat",
            )
        given = {"tools": tools, "add_generation_prompt": add_generation_prompt, **variables}
        return self.chat_template.render(messages, {**self.special, **given})


def _parts(part: Any) -> list[dict[str, Any]]:
    """The JSON of a decoder, pre-tokenizer or post-processor; of its members, where it is a sequence."""
    if part is None:
        return []
    stack, found = [json.loads(part.__getstate__())], []
    while stack:
        item = stack.pop()
        if item["type"] == "Sequence":
            stack.extend(members for value in item.values() if isinstance(value, list) for members in value)
        else:
            found.append(item)
    return found


def _strips_space(decoder: Mapping[str, Any]) -> bool:
    """True for a decoder that takes the space before the first word off."""
    if decoder["type"] == "Metaspace":
        return decoder.get("prepend_scheme") != "never"
    return decoder["type"] == "Strip" and decoder["start"] > 0


def _undefined(template: Mapping[str, Any]) -> str | None:
    """A special token that a TemplateProcessing names and does not define."""
    pieces = [*template["single"], *template["pair"]]
    named = [piece["SpecialToken"]["id"] for piece in pieces if "SpecialToken" in piece]
    defined = {name for name, token in template["special_tokens"].items() if token["id"] == name}
    return next((name for name in named if name not in defined), None)
