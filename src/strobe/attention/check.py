"""Is this output right? The bound that tests and benchmarks share.

`max|out - oracle| <= 2 * max|plain - oracle| + atol`, where `plain` is matmul, softmax, matmul with
every intermediate in the problem's dtype, and atol is twice the rounding of that dtype at the
oracle's scale (for float32 and float64 six times, and from 36 keys on sqrt(kv_len) times). lse, float32
always, within 1e-3 for 16-bit inputs, 1e-4 for float32, 1e-5 for float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from strobe.attention.problem import AttentionProblem
from strobe.attention.rows import Row, rows_of

_LSE_ATOL = {"float64": 1e-5, "float32": 1e-4, "float16": 1e-3, "bfloat16": 1e-3}
_MAX_QUERIES = 192
"""Queries checked in each row of a large problem: its first, its last, and a random draw between."""


@dataclass(frozen=True)
class Verdict:
    """`error` and `allowed` are absolute, over out; `lse_error` over lse (0 where none was asked for)."""

    error: float
    allowed: float
    lse_error: float
    lse_allowed: float

    @property
    def right(self) -> bool:
        return self.error <= self.allowed and self.lse_error <= self.lse_allowed

    def __str__(self) -> str:
        return (
            f"max|out - oracle| {self.error:.3g} (allowed {self.allowed:.3g}), "
            f"max|lse - oracle| {self.lse_error:.3g} (allowed {self.lse_allowed:.3g})"
        )


@dataclass(frozen=True)
class _RowAnswer:
    """What float64 gives for the picked queries of a row: out `[q_heads, picked, head_dim]`, lse `[q_heads,
    picked]`."""

    row: int | slice
    """Where the row stands: its index, or its tokens among those of all rows."""
    picked: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor


@dataclass(frozen=True)
class Answers:
    """What any number of outputs of one problem are compared with."""

    problem: AttentionProblem
    rows: list[_RowAnswer]
    plain_error: float

    @classmethod
    def of(
        cls, problem: AttentionProblem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seed: int = 0
    ) -> Answers:
        """In float64 on the tensors' own device; `seed` picks queries of rows with over 192."""
        rng = torch.Generator().manual_seed(seed)
        answers: list[_RowAnswer] = []
        plain_error = 0.0
        for row in rows_of(problem, q, k, v):
            if not len(row.q):
                continue
            picked = _pick(len(row.q), rng).to(q.device)
            sees = row.visible(problem)[picked] if problem.masked else None
            out, lse = _attend(problem, row, picked, sees, torch.float64)
            # one order of summation may be lucky: the plain error is the worse of two
            for backwards in (False, True):
                plain, _ = _attend(problem, row, picked, sees, q.dtype, backwards)
                plain_error = max(plain_error, _difference(plain, out))
            stands = slice(row.q_start, row.q_start + len(row.q)) if row.packed else row.index
            answers.append(_RowAnswer(stands, picked, out, lse))
        return cls(problem, answers, plain_error)

    def verdict(self, out: torch.Tensor, lse: torch.Tensor | None = None) -> Verdict:
        """Compare `out` and `lse`; NaN anywhere in them fails, also at queries that are not picked."""
        problem = self.problem
        error = scale = lse_error = 0.0
        for answer in self.rows:
            error = max(error, _difference(out[answer.row][answer.picked].transpose(0, 1), answer.out))
            scale = max(scale, float(answer.out.abs().max()))
            if lse is not None:
                given = lse[:, answer.row] if isinstance(answer.row, slice) else lse[answer.row]
                lse_error = max(lse_error, _difference(given[:, answer.picked], answer.lse))
        if bool(out.isnan().any()) or (lse is not None and bool(lse.isnan().any())):
            error = float("inf")
        # eps is the spacing at 1, two roundings. A 16-bit answer is summed in more bits than it is given in;
        # a wider one is not: added up key by key its roundings walk at random, as blocked sums hardly do.
        finfo = torch.finfo(getattr(torch, problem.dtype))
        spacings = 1 if finfo.bits == 16 else max(3.0, math.sqrt(problem.kv_len) / 2)
        allowed = 2 * self.plain_error + spacings * finfo.eps * max(scale, 1e-6)
        return Verdict(error, allowed, lse_error, _LSE_ATOL[problem.dtype] * max(1.0, _lse_scale(lse)))


def verdict(
    problem: AttentionProblem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None = None,
    seed: int = 0,
) -> Verdict:
    """Compare `out` and `lse` with float64 on the tensors' own device; NaN anywhere in them fails.

    Rows of over 192 queries are checked at their first, their last and at random queries, over all
    keys and heads; every element is checked for NaN.
    """
    return Answers.of(problem, q, k, v, seed).verdict(out, lse)


def _lse_scale(lse: torch.Tensor | None) -> float:
    """float32 holds an lse in the hundreds to 3e-5 only: the bound grows with it from 100 on."""
    if lse is None:
        return 1.0
    finite = lse[lse.isfinite()]
    return float(finite.abs().max()) / 100 if finite.numel() else 1.0


def _pick(q_len: int, rng: torch.Generator) -> torch.Tensor:
    if q_len <= _MAX_QUERIES:
        return torch.arange(q_len)
    drawn = torch.randint(q_len, (_MAX_QUERIES - 2,), generator=rng)
    return torch.cat([torch.tensor([0, q_len - 1]), drawn]).unique()


def _attend(
    problem: AttentionProblem,
    row: Row,
    picked: torch.Tensor,
    sees: torch.Tensor | None,
    dtype: torch.dtype,
    backwards: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`out [q_heads, picked, head_dim]`, `lse [q_heads, picked]`, every intermediate in `dtype`.

    `backwards` takes the keys, and the dimensions of q and k, from the last to the first.
    """
    outs, lses = [], []
    neg_inf = float("-inf")
    for kv_head in range(problem.kv_heads):
        heads = slice(kv_head * problem.group, (kv_head + 1) * problem.group)
        q = row.q[picked, heads].to(dtype).transpose(0, 1)
        k, v = row.k[:, kv_head].to(dtype), row.v[:, kv_head].to(dtype)
        if backwards:
            q, k = q.flip(-1), k.flip(-1)
        scores = q @ k.T * problem.scale
        if problem.softcap:
            scores = problem.softcap * torch.tanh(scores / problem.softcap)
        if problem.bias is not None:
            everyone = (problem.batch, problem.q_heads, problem.q_len, problem.kv_len)
            scores = scores + problem.bias.expand(everyone)[row.index, heads][:, picked].to(dtype)
        if sees is not None:
            scores = scores.masked_fill(~sees, neg_inf)
        if backwards:
            scores, v = scores.flip(-1), v.flip(0)
        lse = torch.logsumexp(scores.double() if dtype != torch.float32 else scores, dim=-1)
        if problem.sinks is not None:
            lse = torch.logaddexp(lse, problem.sinks[heads, None].to(lse.dtype))
        weights = torch.exp(scores - lse.masked_fill(lse == neg_inf, 0.0).unsqueeze(-1).to(dtype))
        outs.append(weights @ v)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses)


def _difference(given: torch.Tensor, oracle: torch.Tensor) -> float:
    """Largest absolute difference; equal infinities differ by nothing, NaN by everything."""
    given = given.double()
    difference = torch.where(given == oracle, 0.0, (given - oracle.double()).abs())
    return float(difference.nan_to_num(nan=float("inf")).max()) if difference.numel() else 0.0
