"""The kernels that draw tokens against what torch draws on a CPU: on a GPU, and emulated where there is none.

A draw is compared by the token. Probabilities are rounded differently on both sides, so a row may differ
where its number in [0, 1), or top_p, lies within a millionth of the point at which the reference goes over to
another token: `near` are the tokens that it goes over to, and few rows may need them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from cuda_emulator import emulated_gpu, missing

from strobe.ops import sampling, sampling_cuda
from strobe.ops.sampling_cuda import EDIT

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def gpu(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Runs the test on a GPU (True), or in the emulator (False)."""
    emulated = request.param == "emulated"
    if emulated and missing() is not None:
        pytest.skip(str(missing()))
    with emulated_gpu(sm_count=8) if emulated else nullcontext():
        yield not emulated


@dataclass
class Drawing:
    """Rows of logits on a CPU, and how each is drawn: as the kernel reads it, and spelled out."""

    logits: torch.Tensor
    rows: np.ndarray
    seeds: np.ndarray
    counts: list[torch.Tensor | None]
    allowed: np.ndarray
    edits: list[tuple[int, float]] = field(default_factory=list)

    def sample(self) -> list[int]:
        """By the kernel; `counts` and the device's own rows go on."""
        device = torch.device("cuda")
        self.on_device = [None if count is None else count.clone().to(device) for count in self.counts]
        self.rows["counts"] = [0 if count is None else count.data_ptr() for count in self.on_device]
        self.table = sampling_cuda.Table(device)
        self.table.load(self.rows, np.array(self.edits, EDIT))
        bits = np.zeros((len(self.rows), -(-self.logits.shape[1] // 32)), np.int32)
        packed = np.packbits(self.allowed, axis=1, bitorder="little")
        bits.view(np.uint8)[:, : packed.shape[1]] = packed
        masks = torch.from_numpy(bits).to(device)
        return sampling_cuda.sample(self.logits.to(device), self.table, masks).tolist()

    def edited(self, r: int) -> torch.Tensor:
        """Row r's logits `[1, vocab]` with all but the filters taken in."""
        row, x = self.rows[r], self.logits[r : r + 1].float()
        if (count := self.counts[r]) is not None:
            each = [torch.tensor([[float(row[name])]]) for name in ("repetition", "presence", "frequency")]
            x = sampling.penalise(x, sampling.Penalties(count % 2 == 1, (count // 2).float()[None], *each))
        edits = self.edits[row["edits"] :][: row["biases"] + row["forbidden"]]
        x = x.clone()
        for token, bias in edits[: row["biases"]]:
            x[0, token] += bias
        if row["position"] < row["min_tokens"]:
            x[0, [token for token, _ in edits[row["biases"] :]]] = -torch.inf
        return x.masked_fill(torch.from_numpy(~self.allowed[r]), -torch.inf) if row["mask"] >= 0 else x

    def reference(self, r: int) -> tuple[int, set[int]]:
        """Row r's token, and those near it."""
        row, x = self.rows[r], self.edited(r)
        if row["temperature"] == 0:
            token = int(np.argmax(x.numpy()))
            return token, {token}
        number = sampling.uniform(self.seeds[r : r + 1], np.array([row["position"]], np.uint64))[0]

        def draw(off: float, top_p_off: float) -> int:
            top_p = torch.tensor([row["top_p"]])
            filters = sampling.Filters(
                torch.tensor([int(row["top_k"])]),
                top_p if top_p == 1 else (top_p + top_p_off).clamp(max=1 - 2**-24),
                torch.tensor([row["log_min_p"]]).exp(),
            )
            at = torch.tensor([min(max(number + off, 0.0), 1 - 2**-52)], dtype=torch.float64)
            return int(sampling.draw(x, torch.tensor([row["temperature"]]), filters, at))

        return draw(0, 0), {draw(a, b) for a in (-1e-6, 0, 1e-6) for b in (-1e-6, 0, 1e-6)}


def random_drawing(rng: np.random.Generator, rows: int, vocab: int, dtype: torch.dtype) -> Drawing:
    """Rows of all kinds: each number is there or left out."""
    logits = (rng.standard_normal((rows, vocab)) * rng.choice([0.5, 3, 8], (rows, 1))).astype(np.float32)
    logits[::3] = logits[::3].round()  # ties
    seeds = rng.integers(0, 1 << 64, rows, np.uint64)
    packed = np.concatenate([sampling_cuda.greedy_row(int(seed), vocab) for seed in seeds])
    drawing = Drawing(torch.from_numpy(logits).to(dtype), packed, seeds, [], rng.random((rows, vocab)) < 0.3)
    drawing.allowed[:, 0] = True
    packed["position"] = rng.integers(0, 50, rows)
    packed["temperature"] = rng.choice([0, 0.3, 1, 2.5], rows)
    packed["mask"] = np.where(rng.random(rows) < 0.3, np.arange(rows), -1)
    for row in packed:
        if rng.random() < 0.5:
            row["top_k"] = rng.integers(1, min(vocab, 60) + 1)
        if rng.random() < 0.5:
            row["top_p"] = rng.uniform(0.05, 0.99)
        if rng.random() < 0.3:
            row["log_min_p"] = np.log(np.float32(rng.choice([0.02, 0.3, 1])))
        row["edits"] = len(drawing.edits)
        edited = (1 + rng.permutation(vocab - 1)[: rng.integers(0, 8)]).tolist()  # never 0: one may be drawn
        row["biases"] = rng.integers(0, len(edited) + 1)
        row["forbidden"], row["min_tokens"] = len(edited) - row["biases"], rng.integers(0, 60)
        drawing.edits += [(token, float(np.float32(rng.uniform(-5, 5)))) for token in edited]
        seen = rng.integers(0, 4, vocab) * (rng.random(vocab) < 0.2) * 2 + (rng.random(vocab) < 0.2)
        drawing.counts.append(torch.from_numpy(seen.astype(np.int32)) if rng.random() < 0.4 else None)
        row["repetition"], row["presence"], row["frequency"] = rng.uniform(0.5, 2), *rng.uniform(-1, 1, 2)
    return drawing


@dtypes
@pytest.mark.parametrize("vocab", [1, 7, 33, 260, 2048, 5001, 50257, 128256, 262144])
def test_draws_the_reference_tokens(gpu: bool, vocab: int, dtype: torch.dtype) -> None:
    seed = np.random.SeedSequence().entropy
    rows = 40 if gpu else min(12, max(1, 60_000 // vocab))
    drawing = random_drawing(np.random.default_rng(seed), rows, vocab, dtype)
    drawn = drawing.sample()
    expected = [drawing.reference(row) for row in range(rows)]
    for row, (token, (_, near)) in enumerate(zip(drawn, expected, strict=True)):
        assert token in near, f"row {row} of seed {seed}"
    assert sum(token != exact for token, (exact, _) in zip(drawn, expected, strict=True)) <= 1
    for token, before, after in zip(drawn, drawing.counts, drawing.on_device, strict=True):
        if before is not None and after is not None:
            before[token] += 2
            assert torch.equal(after.cpu(), before)


@dtypes
@pytest.mark.parametrize("vocab", [1, 31, 2048, 50257])
def test_the_likeliest_of_equals_is_the_lowest(gpu: bool, vocab: int, dtype: torch.dtype) -> None:
    logits = torch.randn(6, vocab + 3).mul(3).round().to(dtype)[:, :vocab]  # rows off their alignment
    logits[0] = -torch.inf
    logits[1] = 0.0
    logits[1, vocab // 2 :] = -0.0
    expected = logits.float().numpy().argmax(-1).tolist()
    assert sampling_cuda.sample(logits.cuda()).tolist() == expected


def test_a_row_draws_alike_in_any_batch_and_by_any_blocks(gpu: bool) -> None:
    """A row alone is shared by many blocks, and in a large batch by few."""
    drawing = random_drawing(np.random.default_rng(), 24, 5001, torch.float32)
    together = drawing.sample()
    for row in (0, 5, 23):
        one = slice(row, row + 1)
        alone = Drawing(
            drawing.logits[one], drawing.rows[one].copy(), drawing.seeds[one], drawing.counts[one],
            drawing.allowed[one], drawing.edits,
        )  # fmt: skip
        alone.rows["mask"] = np.minimum(alone.rows["mask"], 0)
        assert alone.sample() == together[one]
    blocks = {sampling_cuda.blocks_for(rows, 5001, 8, holds=True) for rows in (1, 24)}
    assert gpu or len(blocks) == 2


def test_positions_count_on(gpu: bool) -> None:
    """Drawn step after step from one table, the numbers are those of the positions."""
    vocab, steps = 40, 8
    drawing = random_drawing(np.random.default_rng(), 3, vocab, torch.float32)
    drawing.rows[0] = sampling_cuda.greedy_row(int(drawing.seeds[0]), vocab)[0]  # all tokens alike
    drawing.logits[0] = 0
    drawing.rows["temperature"], drawing.rows["mask"], drawing.counts = 1.5, -1, [None] * 3
    first = drawing.sample()
    logits = drawing.logits.to("cuda")
    drawn = [first, *(sampling_cuda.sample(logits, drawing.table).tolist() for _ in range(steps - 1))]
    for tokens in drawn:
        for row, token in enumerate(tokens):
            assert token in drawing.reference(row)[1]
        drawing.rows["position"] += 1
    assert len({tokens[0] for tokens in drawn}) > 1


def seed_stream(number: float, position: int) -> int:
    """The stream whose number at `position` it is: SplitMix64's output function backwards."""
    mask, z = (1 << 64) - 1, int(number * 2**52) << 12
    for shift, factor in ((31, 0x94D049BB133111EB), (27, 0xBF58476D1CE4E5B9), (30, 1)):
        z ^= (z >> shift) ^ (z >> 2 * shift)
        z = z * pow(factor, -1, 1 << 64) & mask
    return (z - (position + 1) * 0x9E3779B97F4A7C15) & mask


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(70, 1, 0), (9, 1, 0), (70, 0.8, 0), (25, 0.9, 0.03), (70, 1, 0.1), (1, 0.5, 0)],
)
def test_each_token_kept_has_its_stretch_of_numbers(
    gpu: bool, top_k: int, top_p: float, min_p: float
) -> None:
    """A token too many or too few would move the middles of the others' stretches."""
    rng, vocab, temperature = np.random.default_rng(), 70, 1.25
    logits = (2.5 * rng.standard_normal(vocab)).round(1 if rng.random() < 0.5 else 6).astype(np.float32)
    p = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    order = np.argsort(-p, kind="stable")
    head = p[order[:top_k]] / p[order[:top_k]].sum()
    last = order[:top_k][(np.cumsum(head) - head < top_p).sum() - 1]
    p = np.where((p >= p[last]) & (p >= min_p), p, 0)  # with what ties with the last
    p /= p.sum()
    kept = np.flatnonzero(p > 1e-4)
    rows = np.concatenate([sampling_cuda.greedy_row(0, vocab)] * len(kept))
    rows["temperature"], rows["top_k"], rows["top_p"] = temperature, top_k, top_p
    rows["log_min_p"] = np.log(np.float32(min_p)) if min_p else -np.inf
    rows["position"] = rng.integers(0, 1000, len(kept))
    middles = (np.cumsum(p) - p / 2)[kept]
    pairs = zip(middles, rows["position"].tolist(), strict=True)
    rows["stream"] = [seed_stream(middle, position) for middle, position in pairs]
    table = sampling_cuda.Table(torch.device("cuda"))
    table.load(rows, np.zeros(0, EDIT))
    drawn = sampling_cuda.sample(torch.from_numpy(logits).expand(len(kept), -1).contiguous().cuda(), table)
    assert drawn.tolist() == kept.tolist()


def test_distribution(gpu: bool) -> None:
    """Tokens come as often as their probabilities say, and none from outside the filters."""
    rng, vocab = np.random.default_rng(7), 64
    rows = 20_000 if gpu else 200
    logits = (2 * rng.standard_normal(vocab)).astype(np.float32)
    packed = np.concatenate([sampling_cuda.greedy_row(17, vocab)] * rows)
    packed["position"] = np.arange(rows)
    packed["temperature"], packed["top_k"], packed["top_p"], packed["log_min_p"] = 1.5, 20, 0.85, np.log(0.05)
    drawing = Drawing(
        torch.from_numpy(logits).expand(rows, -1).contiguous(), packed, np.full(rows, 17, np.uint64),
        [None] * rows, np.ones((rows, vocab), bool),
    )  # fmt: skip
    counts = np.bincount(drawing.sample(), minlength=vocab)
    order = np.argsort(-logits)
    p = np.exp((logits.astype(np.float64) - logits.max()) / 1.5)
    head = p[order[:20]] / p[order[:20]].sum()
    kept = order[:20][np.cumsum(head) - head < 0.85]
    kept = kept[p[kept] >= 0.05]
    expected = np.where(np.isin(np.arange(vocab), kept), p, 0)
    expected *= rows / expected.sum()
    assert not counts[expected == 0].any()
    there = expected > 0
    statistic = ((counts - expected)[there] ** 2 / expected[there]).sum()
    freedom = there.sum() - 1
    assert statistic < freedom + 5 * np.sqrt(2 * freedom)


@dtypes
@pytest.mark.parametrize(("vocab", "top"), [(1, 1), (260, 0), (5001, 20), (128256, 5)])
def test_logprobs(gpu: bool, vocab: int, top: int, dtype: torch.dtype) -> None:
    logits = (5 * torch.randn(5, vocab)).to(dtype)
    logits[0] = logits[0].round()
    tokens, rows = torch.randint(vocab, (5,)), torch.tensor([3, 0], dtype=torch.int32)
    wanted = torch.log_softmax(logits.double(), dim=-1)
    order = torch.sort(logits.float(), dim=-1, descending=True, stable=True).indices[:, :top]
    for chosen_rows, at in ((None, slice(None)), (rows.cuda(), rows.long())):
        chosen, values, ids = (
            tensor.cpu() for tensor in sampling_cuda.logprobs(logits.cuda(), tokens.cuda(), top, chosen_rows)
        )
        close = {"rtol": 0, "atol": 1e-5, "check_dtype": False}
        torch.testing.assert_close(chosen, wanted[at].gather(1, tokens[at, None])[:, 0], **close)
        assert torch.equal(ids, order[at])
        torch.testing.assert_close(values, wanted[at].gather(1, order[at]), **close)


def test_no_mass_draws_a_token_all_the_same(gpu: bool) -> None:
    """Broken logits must not break the step: NaN and infinity."""
    logits = torch.zeros(4, 300)
    logits[0], logits[1], logits[2, 7], logits[3, 9] = -torch.inf, torch.nan, torch.inf, torch.nan
    rows = np.concatenate([sampling_cuda.greedy_row(row, 300) for row in range(4)])
    rows["temperature"], rows["top_k"], rows["top_p"] = 1, [300, 5, 300, 5], [1, 0.5, 0.5, 1]
    table = sampling_cuda.Table(torch.device("cuda"))
    table.load(rows, np.zeros(0, EDIT))
    tokens = sampling_cuda.sample(logits.cuda(), table).tolist()
    assert all(0 <= token < 300 for token in tokens)
    assert tokens[2] == 7
