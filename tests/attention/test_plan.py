"""Calls that are alike share a plan; calls that are not never do."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from strobe.attention import Dense, Packed, Paged, plan
from strobe.attention.api import attention
from strobe.attention.problem import Options
from strobe.errors import ProblemError


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> list[Options]:
    """The options of every call that was described, not found."""
    seen: list[Options] = []
    real = plan.describe

    def describe(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options) -> Any:
        seen.append(options)
        return real(q, k, v, options)

    monkeypatch.setattr(plan, "describe", describe)
    monkeypatch.setattr(plan, "_dense", {})
    monkeypatch.setattr(plan, "_recent", {})
    return seen


def qkv(length: int = 9, heads: int = 4) -> list[torch.Tensor]:
    return [torch.randn(2, length, n, 16) for n in (heads, 2, 2)]


def test_calls_that_are_alike_are_described_once(described: list[Options]) -> None:
    for layout in (None, Dense(), Dense()):
        for _ in range(3):
            attention(*qkv(), causal=True, layout=layout)
    assert len(described) == 1


@pytest.mark.parametrize(
    "parts", [None, SimpleNamespace(TensorGuards=lambda *tensors: None)], ids=["none", "other"]
)
def test_a_torch_without_these_private_parts(
    parts: Any, described: list[Options], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = qkv()
    expected = attention(*inputs, causal=True), *attention(*inputs, return_lse=True)
    plan._dense.clear()
    plan._recent.clear()
    monkeypatch.setattr(plan, "guards", parts)
    for _ in range(2):
        found = attention(*inputs, causal=True), *attention(*inputs, return_lse=True)
        assert all(map(torch.equal, found, expected))
    assert len(described) == 4


def test_unlike_calls_have_plans_of_their_own(described: list[Options]) -> None:
    q, k, v = qkv()
    calls: list[dict[str, Any]] = [
        {},
        {"causal": True},
        {"window": (3, 0)},
        {"scale": 0.3},
        {"softcap": 2.0},
        {"sinks": torch.randn(4)},
        {"sinks": torch.randn(4)},
        {"return_lse": True},
        {"kernel": "torch_naive"},
    ]
    for turn in range(2):
        for options in calls:
            attention(q, k, v, **options)
        attention(q[:, 1:], k, v)
        attention(q.transpose(1, 2).contiguous().transpose(1, 2), k, v)
        attention(q.double(), k.double(), v.double())
        assert len(described) == len(calls) + 3, turn


def test_answers_do_not_depend_on_what_was_planned_before(described: list[Options]) -> None:
    """Shapes, strides, masks and addresses in random order, twice: the second time all plans are found."""
    calls = []
    for _ in range(20):
        q, k, v = qkv(random.randint(1, 12), random.choice([2, 4]))
        if random.random() < 0.5:
            q = q.transpose(1, 2).contiguous().transpose(1, 2)
        calls.append((q, k, v, {"causal": random.random() < 0.5, "window": (random.randint(-1, 5), -1)}))
    first = [attention(q, k, v, **options) for q, k, v, options in calls]
    made = len(described)
    for (q, k, v, options), expected in zip(calls, first, strict=True):
        assert torch.equal(attention(q, k, v, **options), expected)
        by_formula = attention(q, k, v, kernel="textbook", **options)
        torch.testing.assert_close(expected, by_formula, atol=1e-5, rtol=1e-5)
    assert len(described) - made <= made  # the textbook's own


def test_a_layouts_plans_live_with_it(described: list[Options]) -> None:
    q, k, v = qkv(1)
    table, lens = torch.tensor([[0], [1]], dtype=torch.int32), torch.tensor([1, 1], dtype=torch.int32)
    sums = torch.tensor([0, 2], dtype=torch.int32)
    for layout, tensors in (
        (Paged(table, lens), (q, k, v)),
        (Packed(sums, sums), (q[:, 0], k[:, 0], v[:, 0])),
    ):
        before = len(described)
        for _ in range(3):
            attention(*tensors, layout=layout)
        assert len(described) == before + 1
    attention(q, k, v, layout=Paged(table, lens))
    assert len(described) == 3
    assert not plan._dense


@pytest.mark.parametrize("kernel", ["torch_naive", "torch_sdpa", "torch_grouped", "auto"])
def test_a_layout_that_was_written_to_is_read_again(kernel: str) -> None:
    q, k, v = torch.randn(2, 1, 4, 16), *torch.randn(2, 3, 7, 2, 16)
    table, lens = torch.tensor([[0], [1]], dtype=torch.int32), torch.tensor([7, 2], dtype=torch.int32)
    layout = Paged(table, lens)
    attention(q, k, v, layout=layout, kernel=kernel)
    table[0], lens[1] = 2, 5
    expected = attention(q, k, v, layout=Paged(table.clone(), lens.clone()), kernel="torch_naive")
    torch.testing.assert_close(attention(q, k, v, layout=layout, kernel=kernel), expected)
    table[1] = 3
    with pytest.raises(ProblemError, match="page_table holds page 3; the cache has 3 pages"):
        attention(q, k, v, layout=layout, kernel=kernel)
    table[1], lens[0] = 0, 8
    with pytest.raises(ProblemError, match="a row has 8 keys"):
        attention(q, k, v, layout=layout, kernel=kernel)


@pytest.mark.parametrize("kernel", ["torch_grouped", "torch_sdpa", "auto"])
def test_one_layout_over_caches_that_are_unlike(kernel: str) -> None:
    """A page table of few pages fits caches of any page_size, and one of a draft model's heads."""
    table = torch.randperm(8)[:8].view(2, 4).int()
    lens = torch.randint(1, 60, (2,), dtype=torch.int32)
    layout = Paged(table, lens)
    for page_size, kv_heads, dtype in (
        (16, 2, torch.float32),
        (32, 2, torch.float32),
        (16, 4, torch.bfloat16),
    ):
        q = torch.randn(2, 1, 8, 16).to(dtype)
        k, v = torch.randn(2, 8, page_size, kv_heads, 16).to(dtype)
        given = attention(q, k, v, layout=layout, kernel=kernel)
        expected = attention(q, k, v, layout=Paged(table, lens), kernel="torch_naive")
        torch.testing.assert_close(given, expected, atol=0.02, rtol=0)


def test_sums_that_were_written_to_are_checked_again() -> None:
    q, k, v = torch.randn(3, 8, 2, 16)
    sums = torch.tensor([0, 3, 8], dtype=torch.int32)
    layout = Packed(sums, sums.clone())
    attention(q, k, v, layout=layout)
    sums[1] = 6
    fresh = Packed(sums.clone(), layout.cu_seqlens_kv)
    torch.testing.assert_close(attention(q, k, v, layout=layout), attention(q, k, v, layout=fresh))
    sums[2] = 9
    with pytest.raises(ProblemError, match="cu_seqlens_q is"):
        attention(q, k, v, layout=layout)


def test_a_bias_is_not_kept(described: list[Options]) -> None:
    q, k, v = qkv()
    bias = torch.zeros(9, 9)
    free = attention(q, k, v, bias=bias)
    bias.fill_(float("-inf")).fill_diagonal_(0)
    assert not torch.equal(attention(q, k, v, bias=bias), free)
    assert not plan._dense


def test_plans_are_bounded(described: list[Options], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "MOST", 5)
    for length in range(1, 20):
        attention(*qkv(length))
        assert len(plan._dense) <= 5


def test_plans_of_a_layout_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sinks that are made anew for each call are other options each time, and a plan holds them."""
    monkeypatch.setattr(plan, "MOST", 4)
    q, k, v = qkv(1)
    layout = Paged(torch.tensor([[0], [1]], dtype=torch.int32), torch.tensor([1, 1], dtype=torch.int32))
    for _ in range(11):
        attention(q, k, v, layout=layout, sinks=torch.randn(4))
    held = [kept for kept in layout.scratch.values() if isinstance(kept, dict)]
    assert len(layout.scratch) < 8
    assert [1 <= len(kept) <= 4 for kept in held] == [True]


def test_what_is_refused_stays_refused(described: list[Options]) -> None:
    q, k, v = qkv()
    for _ in range(2):
        with pytest.raises(ProblemError, match=r"softcap -1\.0"):
            attention(q, k, v, softcap=-1.0)
        with pytest.raises(ProblemError, match="window"):
            attention(q, k, v, window=[0, 0])  # type: ignore[arg-type]
    assert not plan._dense


def test_calls_like_a_recent_one_read_no_shapes(
    described: list[Options], monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = qkv()
    first = attention(q, k, v, causal=True, return_lse=True)
    monkeypatch.setattr(plan, "of", None)
    for given, expected in zip(attention(q, k, v, causal=True, return_lse=True), first, strict=True):
        assert torch.equal(given, expected)
        assert given.stride() == expected.stride()


def test_shapes_in_turns_are_all_recent(described: list[Options], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = [qkv(length) for length in range(1, plan.RECENT + 2)]
    expected = [attention(*call) for call in calls]
    find = plan.of
    missed: list[int] = []

    def of(q: torch.Tensor, *rest: Any) -> plan.Plan:
        missed.append(q.shape[1])
        return find(q, *rest)

    monkeypatch.setattr(plan, "of", of)
    for _ in range(3):
        for call, right in zip(calls[1:], expected[1:], strict=True):
            assert torch.equal(attention(*call), right)
    assert not missed
    assert torch.equal(attention(*calls[0]), expected[0])
    assert missed == [1]
    assert len(described) == len(calls)


@pytest.mark.parametrize(
    "other",
    [
        lambda q: q[:, 1:],
        lambda q: q.transpose(1, 2).contiguous().transpose(1, 2),
        lambda q: q.double(),
        lambda q: q.clone().requires_grad_(),
        lambda q: torch.nn.Parameter(q, requires_grad=False),
        lambda q: q.to("meta"),
        lambda q: q[0],
        lambda q: q.tolist(),
    ],
    ids=["shape", "strides", "dtype", "requires_grad", "class", "device", "dimensions", "no tensor"],
)
def test_calls_unlike_a_recent_one_are_told_from_it(described: list[Options], other: Any) -> None:
    q, k, v = qkv()
    attention(q, k, v)
    assert plan.recent(q, k, v, None, ("auto", *Options()))
    for odd in range(3):
        tensors: list[Any] = [q, k, v]
        tensors[odd] = other(tensors[odd])
        assert plan.recent(*tensors, None, ("auto", *Options())) is None
    for asked in (("auto", *Options(causal=True)), ("torch_naive", *Options()), ("auto", *Options(sinks=[]))):
        assert plan.recent(q, k, v, None, asked) is None


def test_inference_mode_has_plans_of_its_own(described: list[Options]) -> None:
    q, k, v = qkv()
    expected = attention(q, k, v)
    for _ in range(2):
        with torch.inference_mode():
            out = attention(q, k, v)
        assert out.is_inference()
        assert torch.equal(out, expected)
        assert not attention(q, k, v).is_inference()
    assert len(described) == 1


def test_a_call_on_another_gpu_than_the_current_is_not_recent(
    described: list[Options], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `recent` gives takes its memory from the current one."""
    q, k, v = qkv()
    asked = ("auto", *Options())
    current = 1
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: current, raising=False)
    monkeypatch.setitem(plan._recent, asked, ((lambda *_: True, 1, attention),))
    assert plan.recent(q, k, v, None, asked) is attention
    current = 0
    assert plan.recent(q, k, v, None, asked) is None
