"""PyTorch's own fused attention: the fastest rung on a CPU, and the plain peer on a GPU.

Rows of different lengths are run in padded groups: rows of one q_len and of similar kv_len share a
call. The gather indices and masks are made once per layout and shared by all layers of a forward
pass. Padding points at a real key of the same row, so that nothing past a row's end is ever read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from strobe.attention.problem import UNLIMITED, AttentionProblem, Dense, Paged
from strobe.attention.rows import visible

TAKES_BIAS = True
DIFFERENTIABLE = True
IDEA = "torch.nn.functional.scaled_dot_product_attention over gathered, padded rows"

_SHORT = 256
"""Rows up to this many keys share a group whatever their lengths: a call costs more than its padding."""


def refusals(problem: AttentionProblem) -> list[str]:
    reasons = []
    if problem.softcap:
        reasons.append("no softcap")
    if problem.sinks is not None:
        reasons.append("no sinks")
    if problem.kv_dtype != problem.dtype:
        reasons.append(f"cache in {problem.kv_dtype}; needs q's dtype")
    if problem.return_lse:
        reasons.append("gives no lse")
    return reasons


def run(
    problem: AttentionProblem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    if isinstance(problem.layout, Dense):
        mask = None
        square_causal = problem.window == (UNLIMITED, 0) and problem.q_len == problem.kv_len
        if problem.bias is not None:
            square_causal, mask = False, problem.bias.to(q.dtype)
            if problem.masked:
                seen = visible(problem, problem.q_len, problem.kv_len, q.device)
                mask = mask.masked_fill(~seen, float("-inf"))
        elif problem.masked and not square_causal:
            mask = visible(problem, problem.q_len, problem.kv_len, q.device)
        out.copy_(_sdpa(problem, q, k, v, mask, square_causal))
        return
    k, v = (k.flatten(0, 1), v.flatten(0, 1)) if isinstance(problem.layout, Paged) else (k, v)
    for group in _groups(problem, q.device):
        shape = (group.rows, group.q_len)
        group_q = group.take(q if problem.packed_q else q.flatten(0, 1)).view(*shape, *q.shape[-2:])
        if group.kv_len == 0:
            group_out = torch.zeros_like(group_q)
        else:
            kv_shape = (group.rows, group.kv_len, problem.kv_heads, problem.head_dim)
            group_k, group_v = (cache.index_select(0, group.kv_at).view(kv_shape) for cache in (k, v))
            group_out = _sdpa(problem, group_q, group_k, group_v, group.mask, group.square_causal)
        group.put(out if problem.packed_q else out.view(-1, *out.shape[-2:]), group_out.flatten(0, 1))


def _sdpa(
    problem: AttentionProblem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    square_causal: bool,
) -> torch.Tensor:
    """q `[rows, q_len, q_heads, head_dim]`, k and v alike; mask broadcasts to `[rows, 1, q_len, kv_len]`."""
    if k.shape[1] == 0:
        return torch.zeros_like(q)
    return F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=square_causal,
        scale=problem.scale,
        enable_gqa=problem.group > 1,
    ).transpose(1, 2)


@dataclass(frozen=True, eq=False)
class _Group:
    """Rows of one q_len that run as one padded call. `q_at` and `kv_at` index tokens laid end to end."""

    rows: int
    q_len: int
    kv_len: int
    q_at: torch.Tensor | slice
    kv_at: torch.Tensor
    mask: torch.Tensor | None
    square_causal: bool

    def take(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens[self.q_at] if isinstance(self.q_at, slice) else tokens.index_select(0, self.q_at)

    def put(self, tokens: torch.Tensor, values: torch.Tensor) -> None:
        tokens[self.q_at] = values


def _groups(problem: AttentionProblem, device: torch.device) -> list[_Group]:
    """The groups of a layout under this problem's mask, kept with the layout until that is written to."""
    layout = problem.layout
    if isinstance(layout, Dense):
        return _make_groups(problem, device)
    key = f"torch_sdpa {problem.window} {problem.page_size}"
    written, groups = layout.scratch.get(key, (None, []))
    if written != layout.written:
        groups = _make_groups(problem, device)
        layout.scratch[key] = layout.written, groups
    return groups


def _make_groups(problem: AttentionProblem, device: torch.device) -> list[_Group]:
    lengths = problem.row_lengths()
    members: dict[tuple[int, int], list[int]] = defaultdict(list)
    for row, (q_len, kv_len) in enumerate(lengths):
        if q_len:
            size = 0 if kv_len == 0 else max(kv_len, _SHORT).bit_length()
            members[q_len, size].append(row)
    q_starts, kv_starts, q_total, kv_total = [], [], 0, 0
    for q_len, kv_len in lengths:
        q_starts.append(q_total)
        kv_starts.append(kv_total)
        q_total, kv_total = q_total + q_len, kv_total + kv_len
    return [_group(problem, lengths, rows, q_starts, kv_starts, device) for rows in members.values()]


def _group(
    problem: AttentionProblem,
    lengths: Sequence[tuple[int, int]],
    rows: list[int],
    q_starts: list[int],
    kv_starts: list[int],
    device: torch.device,
) -> _Group:
    q_len = lengths[rows[0]][0]
    kv_lens = torch.tensor([lengths[row][1] for row in rows], device=device)
    padded = int(kv_lens.max())
    # [rows, padded] token numbers; past its end a row repeats its first key, which the mask hides
    at = torch.arange(padded, device=device).expand(len(rows), padded)
    at = torch.where(at < kv_lens[:, None], at, 0)
    layout = problem.layout
    if isinstance(layout, Paged):
        table = layout.page_table[torch.tensor(rows, device=device)].long()
        if padded:
            at = table.gather(1, at // problem.page_size) * problem.page_size + at % problem.page_size
    else:
        at = at + torch.tensor([kv_starts[row] for row in rows], device=device)[:, None]
    if rows == list(range(rows[0], rows[0] + len(rows))):
        q_at: torch.Tensor | slice = slice(q_starts[rows[0]], q_starts[rows[0]] + len(rows) * q_len)
    else:
        starts = torch.tensor([q_starts[row] for row in rows], device=device)
        q_at = (starts[:, None] + torch.arange(q_len, device=device)).flatten()
    alike = bool((kv_lens == padded).all())
    square_causal = alike and problem.window == (UNLIMITED, 0) and q_len == padded
    mask = None if square_causal else _mask(problem, q_len, kv_lens, padded)
    return _Group(len(rows), q_len, padded, q_at, at.flatten(), mask, square_causal)


def _mask(problem: AttentionProblem, q_len: int, kv_lens: torch.Tensor, padded: int) -> torch.Tensor | None:
    """bool `[rows, 1, q_len, padded]`, or None where every query sees every key."""
    left, right = problem.window
    key = torch.arange(padded, device=kv_lens.device)
    position = torch.arange(q_len, device=kv_lens.device)[None, :, None] + (kv_lens - q_len)[:, None, None]
    seen = (key < kv_lens[:, None, None]).expand(-1, q_len, -1)
    if right != UNLIMITED:
        seen = seen & (key <= position + right)
    if left != UNLIMITED:
        seen = seen & (key >= position - left)
    return None if bool(seen.all()) else seen.unsqueeze(1)
