"""attention() and the ladder: what they refuse, what they say, what they choose."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strobe.attention import AttentionProblem, Packed, Paged, ladder
from strobe.attention.api import attention
from strobe.errors import KernelRefusedError, ProblemError, StrobeError, UnknownNameError


def qkv(
    q_heads: int = 4, kv_heads: int = 2, head_dim: int = 8
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q = torch.randn(2, 5, q_heads, head_dim)
    k, v = torch.randn(2, 2, 7, kv_heads, head_dim)
    return q, k, v


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def paged(table: list[list[int]], lens: list[int], **lengths: int) -> Paged:
    return Paged(torch.tensor(table, dtype=torch.int32), int32(*lens), **lengths)


Q, K, V = qkv()
BAD_CALLS = {
    "q is a list": lambda: attention([1.0], K, V),
    "q has dtype torch.int64": lambda: attention(Q.long(), K, V),
    "q_heads 3 is not a multiple of kv_heads 2": lambda: attention(Q[:, :, :3], K, V),
    "head_dim of q is 4, of k 8": lambda: attention(Q[..., :4], K, V),
    "batch of q is 1, of k 2": lambda: attention(Q[:1], K, V),
    "k is [2, 6, 2, 8], v [2, 7, 2, 8]": lambda: attention(Q, K[:, :6], V),
    "k has dtype torch.float32, v torch.float64": lambda: attention(Q, K, V.double()),
    "q has dtype torch.float64, k torch.float32": lambda: attention(Q.double(), K, V),
    "q is [5, 4, 8]; supported: 4 dimensions": lambda: attention(Q[0], K, V),
    "q's last dimension is not contiguous": lambda: attention(Q.transpose(2, 3), K, V),
    "window (-2, 0)": lambda: attention(Q, K, V, window=(-2, 0)),
    "softcap -1.0": lambda: attention(Q, K, V, softcap=-1.0),
    "softcap nan": lambda: attention(Q, K, V, softcap=float("nan")),
    "sinks is [2]": lambda: attention(Q, K, V, sinks=torch.zeros(2)),
    "cu_seqlens_q is list": lambda: attention(Q[0], K[0], V[0], layout=Packed([0, 5], int32(0, 7))),
    "cu_seqlens_q and cu_seqlens_kv have (2, 3)": lambda: attention(
        Q[0], K[0], V[0], layout=Packed(int32(0, 5), int32(0, 3, 7))
    ),
    "seq_lens is torch.int64 [2]": lambda: attention(
        Q, K, V, layout=Paged(int32(0, 1).view(2, 1), torch.tensor([7, 7]))
    ),
    "page_table's last dimension is not contiguous": lambda: attention(
        Q, K, V, layout=Paged(int32(0, 1, 1, 0).view(2, 2).t(), int32(7, 7))
    ),
    "seq_lens's last dimension is not contiguous": lambda: attention(
        Q, K, V, layout=Paged(int32(0, 1).view(2, 1), int32(7, 0, 7, 0)[::2])
    ),
    "cu_seqlens_kv's last dimension is not contiguous": lambda: attention(
        Q[0], K[0], V[0], layout=Packed(int32(0, 5), int32(0, 0, 7)[::2])
    ),
    "a row has 8 keys; page_table [2, 1] holds 7": lambda: attention(
        Q, K, V, layout=Paged(int32(0, 1).view(2, 1), int32(7, 8))
    ),
    "batch of q, seq_lens and page_table is (2, 1, 2)": lambda: attention(
        Q, K, V, layout=Paged(int32(0, 1).view(2, 1), int32(7))
    ),
    "q has dtype torch.float8_e4m3fn": lambda: attention(Q.to(torch.float8_e4m3fn), K, V),
    "q is on meta": lambda: attention(Q.to("meta"), K.to("meta"), V.to("meta")),
    "q_heads is 0": lambda: attention(Q[:, :, :0], K, V),
    "head_dim is 0": lambda: attention(Q[..., :0], K[..., :0], V[..., :0]),
    "kv_heads is 0": lambda: attention(Q, K[:, :, :0], V[:, :, :0]),
    "window 5": lambda: attention(Q, K, V, window=5),
    "window (nan, 0)": lambda: attention(Q, K, V, window=(float("nan"), 0)),
    "window (0, 1267650600228229401496703205376)": lambda: attention(Q, K, V, window=(0, 1 << 100)),
    "scale nan": lambda: attention(Q, K, V, scale=float("nan")),
    "scale '1'": lambda: attention(Q, K, V, scale="1"),
    "softcap None": lambda: attention(Q, K, V, softcap=None),
    "causal is 'no'": lambda: attention(Q, K, V, causal="no"),
    "sinks is a list": lambda: attention(Q, K, V, sinks=[0.0] * 4),
    "sinks is [4] torch.int64": lambda: attention(Q, K, V, sinks=torch.zeros(4).long()),
    "bias is a list": lambda: attention(Q, K, V, bias=[0.0]),
    "layout is 'paged'": lambda: attention(Q, K, V, layout="paged"),
    "window [0, 0]": lambda: attention(Q, K, V, layout=paged([[0], [1]], [7, 7]), window=[0, 0]),
    "seq_lens holds -3": lambda: attention(Q, K, V, layout=paged([[0], [1]], [7, -3])),
    "max_kv_len is 6, and a row has 7": lambda: attention(
        Q, K, V, layout=paged([[0], [1]], [7, 7], max_kv_len=6)
    ),
    "max_q_len is -1": lambda: attention(
        Q[0], K[0], V[0], layout=Packed(int32(0, 5), int32(0, 7), max_q_len=-1)
    ),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_inputs_are_named(message: str) -> None:
    with pytest.raises(ProblemError, match=re.escape(message)):
        BAD_CALLS[message]()


@pytest.mark.parametrize("sums", [[0, 4, 2, 5], [1, 5], [-1, 5], [0, 6], [0, 2**31 - 1]], ids=str)
def test_bad_running_sums_are_named(sums: list[int]) -> None:
    cu_seqlens = int32(*sums)
    rows = len(sums) - 1
    pages = Paged(torch.zeros(rows, 1, dtype=torch.int32), torch.ones(rows, dtype=torch.int32), cu_seqlens)
    said = re.escape(f"cu_seqlens_q is {sums}; supported: from 0, never falling, up to 5 tokens")
    with pytest.raises(ProblemError, match=said):
        attention(Q[0], K[0], V[0], layout=Packed(cu_seqlens, cu_seqlens))
    with pytest.raises(ProblemError, match=said):
        attention(Q[0], K, V, layout=pages)


@pytest.mark.parametrize("page", [2, -1, 2**31 - 1])
def test_a_page_that_is_not_there_is_named(page: int) -> None:
    with pytest.raises(ProblemError, match=f"page_table holds page {page}; the cache has 2 pages"):
        attention(Q, K, V, layout=paged([[0], [page]], [7, 7]))


@pytest.mark.parametrize("kernel", ["auto", "torch_naive", "torch_sdpa", "torch_grouped"])
def test_pages_past_a_row_are_never_read(kernel: str) -> None:
    """Only what a row's length reaches is checked, and read: the rest of a table may hold anything."""
    layout = paged([[1, -7], [0, 2**31 - 1]], [7, 3])
    out = attention(Q[:, :1], K, V, layout=layout, kernel=kernel)
    for row, (page, length) in enumerate([(1, 7), (0, 3)]):
        alone = attention(Q[row : row + 1, :1], K[page : page + 1, :length], V[page : page + 1, :length])
        torch.testing.assert_close(out[row : row + 1], alone)


@pytest.mark.parametrize("kernel", [None, 5, "", "x" * 100_000])
def test_no_kernel_of_such_a_name(kernel: object) -> None:
    with pytest.raises(UnknownNameError) as caught:
        attention(Q, K, V, kernel=kernel)
    assert len(str(caught.value)) < 1000


def test_unknown_kernel_suggests_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'torch_naive'"):
        attention(Q, K, V, kernel="torch_naiv")


def test_a_named_kernel_never_falls_back() -> None:
    with pytest.raises(KernelRefusedError, match=r"'torch_sdpa' refuses \(dense batch 2.*no softcap"):
        attention(Q, K, V, softcap=3.0, kernel="torch_sdpa")


def test_auto_takes_one_that_refuses_nothing() -> None:
    problem = AttentionProblem(1, 8, 8, 4, 2, 64, dtype="float32")
    assert ladder.choose(problem).name == "torch_sdpa"
    capped = AttentionProblem(1, 8, 8, 4, 2, 64, dtype="float32", softcap=5.0)
    assert ladder.choose(capped).name == "torch_naive"


def test_explain_gives_every_rung_a_verdict() -> None:
    verdicts = ladder.explain(AttentionProblem(1, 8, 8, 4, 2, 64, dtype="float32", softcap=5.0))
    assert set(verdicts) == set(ladder.RUNGS)
    assert verdicts["prefill/torch_sdpa"] == ["no softcap"]
    assert verdicts["prefill/torch_naive"] == []


def test_what_a_rung_offers_is_its_own() -> None:
    """A name that a module imports for itself must not pass for one that the ladder asks for."""
    for rung in ladder.RUNGS.values():
        for name in ("run", "prepare", "source", "choose_shape", "suits"):
            offered = getattr(rung.module, name, None)
            assert offered is None or offered.__module__ == rung.module.__name__, f"{rung}: {name}"


def test_every_rung_says_its_idea_in_a_line() -> None:
    ideas = [rung.idea for rung in ladder.RUNGS.values()]
    assert all(idea and "\n" not in idea for idea in ideas)
    assert set(ladder.FASTEST_FIRST["prefill"] + ladder.FASTEST_FIRST["decode"]) <= set(ladder.RUNGS)


def test_costs_count_the_visible_part() -> None:
    full = AttentionProblem(2, 16, 16, 4, 2, 64, dtype="float16")
    causal = AttentionProblem(2, 16, 16, 4, 2, 64, dtype="float16", causal=True)
    assert full.flops() == 4 * 2 * 16 * 16 * 4 * 64
    assert causal.flops() == 4 * 2 * (16 * 17 // 2) * 4 * 64
    assert full.bytes() == 2 * (2 * 2 * 16 * 4 * 64) + 2 * (2 * 2 * 16 * 2 * 64)


@settings(max_examples=200, deadline=None)
@given(
    q_len=st.integers(0, 40),
    kv_len=st.integers(0, 40),
    window=st.tuples(st.integers(-1, 45), st.integers(-1, 45)),
    causal=st.booleans(),
)
def test_visible_pairs_are_counted(q_len: int, kv_len: int, window: tuple[int, int], causal: bool) -> None:
    problem = AttentionProblem(3, q_len, kv_len, 4, 2, 8, window=window, causal=causal)
    first, end = problem.key_range(q_len, kv_len)
    assert problem.visible_pairs() == 3 * sum(max(0, e - f) for f, e in zip(first, end, strict=True))


def test_huge_problems_are_described_or_refused() -> None:
    largest = 2**31 - 1
    assert AttentionProblem(1, largest, largest, 1, 1, 64, causal=True).visible_pairs() == largest << 30
    for name in ("batch", "q_len", "kv_len", "q_heads", "kv_heads", "head_dim"):
        sizes = {"batch": 1, "q_len": 1, "kv_len": 1, "q_heads": 1, "kv_heads": 1, "head_dim": 1}
        with pytest.raises(ProblemError, match=f"{name} is 2147483648"):
            AttentionProblem(**{**sizes, name: largest + 1})


def test_empty_calls_give_empty_results() -> None:
    out, lse = attention(Q[:, :0], K, V, return_lse=True)
    assert out.shape == (2, 0, 4, 8)
    assert lse.shape == (2, 4, 0)
    out, lse = attention(Q, K[:, :0], V[:, :0], return_lse=True)
    assert torch.all(out == 0)
    assert torch.all(lse == float("-inf"))


def test_errors_are_one_line() -> None:
    with pytest.raises(StrobeError) as caught:
        attention(Q, K, V, kernel="nothing_like_it")
    assert "\n" not in str(caught.value)
