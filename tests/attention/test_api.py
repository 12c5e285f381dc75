"""attention() and the ladder: what they refuse, what they say, what they choose."""

from __future__ import annotations

import re

import pytest
import torch

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
    "a row has 8 keys; page_table [2, 1] holds 7": lambda: attention(
        Q, K, V, layout=Paged(int32(0, 1).view(2, 1), int32(7, 8))
    ),
    "batch of q, seq_lens and page_table is (2, 1, 2)": lambda: attention(
        Q, K, V, layout=Paged(int32(0, 1).view(2, 1), int32(7))
    ),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_inputs_are_named(message: str) -> None:
    with pytest.raises(ProblemError, match=re.escape(message)):
        BAD_CALLS[message]()


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
