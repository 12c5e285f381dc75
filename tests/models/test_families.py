"""Every family against transformers: equal logits however a text is cut, equal greedy tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers

from strobe.models.network import tensors

TOLERANCE = 1e-4
LENGTH = 43


def logits(network: transformers.PreTrainedModel, text: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return network(text[None]).logits[0]


def assert_close(given: torch.Tensor, expected: torch.Tensor) -> None:
    assert given.dtype == torch.float32
    assert given.shape == expected.shape
    assert (given - expected).abs().max() < TOLERANCE
    assert expected.std() > 0.1, "the test network is degenerate"


def test_prefill(pair, rows):
    text = pair.text(LENGTH)
    (given,) = rows(pair.ours, 1, LENGTH).step([text])
    assert_close(given, logits(pair.theirs, text))


def test_decode_token_by_token(pair, rows):
    text = pair.text(LENGTH)
    row = rows(pair.ours, 1, LENGTH)
    given = torch.cat([row.step([token])[0] for token in text.split(1)])
    assert_close(given, logits(pair.theirs, text))


def test_prompt_in_chunks(pair, rows):
    text = pair.text(LENGTH)
    cuts = torch.randperm(LENGTH - 1, generator=pair.generator)[:4].sort().values + 1
    chunks = text.tensor_split(cuts.tolist())
    row = rows(pair.ours, 1, LENGTH)
    given = torch.cat([row.step([chunk], packed=bool(i % 2))[0] for i, chunk in enumerate(chunks)])
    assert_close(given, logits(pair.theirs, text))


@pytest.mark.parametrize("ahead", [0, 2])
def test_rows_of_a_batch_do_not_see_each_other(pair, rows, ahead):
    texts = [pair.text(length) for length in (17, 1, 30, 9)]
    batch = rows(pair.ours, len(texts), LENGTH)
    first = batch.step(texts)
    more = [pair.text(length) for length in (1, 1, 12, 3)]  # decode rows beside prefill rows
    second = batch.step(more, ahead=ahead)
    last = [pair.text(1) for _ in texts]
    third = batch.step(last, packed=False)
    for row, parts in enumerate(zip(texts, more, last, strict=True)):
        given = torch.cat((first[row], second[row], third[row]))
        assert_close(given, logits(pair.theirs, torch.cat(parts)))


def test_greedy_tokens(pair, rows):
    prompt = pair.text(11)
    row = rows(pair.ours, 1, 11 + 64)
    new = prompt
    tokens: list[int] = []
    for _ in range(64):
        token = row.step([new])[0][-1].argmax()
        tokens.append(int(token))
        new = token[None]
    expected = pair.theirs.generate(
        prompt[None],
        attention_mask=torch.ones(1, len(prompt)),
        max_new_tokens=64,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    if tokens != (wanted := expected[0, 11:].tolist()):
        # equal logits within rounding may still differ in their order: only such a tie may part the two
        first = next(i for i, (a, b) in enumerate(zip(tokens, wanted, strict=True)) if a != b)
        at = logits(pair.theirs, expected[0, : 11 + first])[-1]
        assert (at[wanted[first]] - at[tokens[first]]).abs() < TOLERANCE, (first, tokens, wanted)


def test_only_the_asked_logits(pair, rows):
    text = pair.text(LENGTH)
    seen = []

    def pick(batch):
        seen.append(pair.ours(replace(batch, logits_at=torch.tensor([LENGTH - 1, 3]))))
        return pair.ours(batch)

    row = rows(pair.ours, 1, LENGTH)
    row.model = pick
    row.step([text])
    assert_close(seen[0], logits(pair.theirs, text)[[LENGTH - 1, 3]])


def test_every_weight_counts_once(pair):
    ours = sum(tensor.numel() for tensor in tensors(pair.ours.weights))
    assert ours == sum(parameter.numel() for parameter in pair.theirs.parameters())
