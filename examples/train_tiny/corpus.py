"""The text, its held-out tenth, and the byte-level BPE trained on the other nine."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

TEXT = Path(__file__).with_name("tinyshakespeare.txt")
BOS, EOS, TURN = "<|bos|>", "<|eos|>", "<|turn|>"
BOS_ID, EOS_ID, TURN_ID = range(3)  # the trainer numbers special tokens first, in their order
BREAK = "\n\n"  # between two speeches

# A word with its leading space and apostrophe, a run of marks, a run of newlines, a run of blanks. Newlines
# stand alone, so that a prompt which ends in "ROMEO:" splits as the training text does.
WORDS = r" ?'?\p{L}+| ?[^\s\p{L}]+|\n+|[^\S\n]+"


def split(text: str) -> tuple[str, str]:
    """(training text, held-out text): cut at the first speech that begins in the last tenth."""
    cut = text.index(BREAK, len(text) * 9 // 10) + len(BREAK)
    return text[:cut], text[cut:]


def train_tokenizer(training_text: str, vocab_size: int) -> Tokenizer:
    """A byte-level BPE: any bytes round-trip, and a beginning-of-text token leads every encoding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, TURN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([training_text], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, BOS_ID)]
    )
    return tokenizer


def speeches(tokenizer: Tokenizer, text: str, bpe_dropout: float = 0.0) -> list[list[int]]:
    """The token ids of each speech, without the blank line after it.

    bpe_dropout skips each merge with that probability (Provilkov et al. 2020, arXiv:1910.13267). Each call
    then spells the same words in other tokens, which keeps a small corpus from being learned by heart.
    """
    tokenizer.model.dropout = bpe_dropout or None
    texts = [stripped for speech in text.split(BREAK) if (stripped := speech.strip())]
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    tokenizer.model.dropout = None
    return [encoding.ids for encoding in encodings]


def as_play(tokenizer: Tokenizer, speeches: list[list[int]]) -> tuple[Tensor, Tensor]:
    """(ids of the text as it stands [tokens], index of each speech's first token [speeches])."""
    separator = tokenizer.encode(BREAK, add_special_tokens=False).ids
    return _join([[*speech, *separator] for speech in speeches])


def as_chat(speeches: list[list[int]]) -> tuple[Tensor, Tensor]:
    """The same for a chat: each speech stands between a turn token and an end-of-text token."""
    return _join([[TURN_ID, *speech, EOS_ID] for speech in speeches])


def _join(pieces: list[list[int]]) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([len(piece) for piece in pieces])
    return torch.tensor([token for piece in pieces for token in piece]), lengths.cumsum(0) - lengths
