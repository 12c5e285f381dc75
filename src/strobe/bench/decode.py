"""Decode's shapes: the standard ones, each context for the figure, rows of mixed lengths, a float8 cache."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from strobe.attention.cases import DECODE_BENCH, Case, Inputs, decode_shape
from strobe.attention.problem import Paged
from strobe.errors import ProblemError

FLOAT8 = "float8_e4m3fn"


@dataclass(frozen=True)
class Float8Case(Case):
    """A case whose cache holds float8 numbers with a scale for each key head."""

    def inputs(
        self, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int | None = None
    ) -> Inputs:
        plain = super().inputs(dtype, device, seed)
        layout = plain.options["layout"]
        if not isinstance(layout, Paged):
            raise ProblemError(f"{self.name}: a float8 cache with layout {self.layout}; supported: paged")
        scales = [torch.linspace(0.02, 0.04, self.kv_heads, device=device) for _ in range(2)]
        k, v = (
            (x.float() / scale[:, None]).to(torch.float8_e4m3fn)
            for x, scale in zip((plain.k, plain.v), scales, strict=True)
        )
        layout = replace(layout, k_scale=scales[0], v_scale=scales[1])
        return Inputs(plain.q, k, v, {**plain.options, "layout": layout})


def float8(case: Case) -> Float8Case:
    return Float8Case(**{**case.__dict__, "name": f"{case.name}_float8"})


def mixed(
    rows: int = 64, longest: int = 65536, others: tuple[int, int] = (64, 4096), *, shape: Case | None = None
) -> Case:
    """One long row among shorter ones of random lengths, as a server's batch is."""
    shape = shape or decode_shape(1, 1, 32, 8, 128)
    rng = random.Random(0)  # noqa: S311 - lengths of a benchmark
    lengths = [longest, *(rng.randint(*others) for _ in range(rows - 1))]
    return replace(shape, name=f"mixed_b{rows}_{longest}", rows=tuple((1, n) for n in lengths))


def drafts(case: Case, q_len: int) -> Case:
    """The case with `q_len` new tokens a row, as a draft model or a small chunk brings."""
    rows = tuple((q_len, max(kv, q_len)) for _, kv in case.rows)
    return replace(case, name=f"{case.name}_q{q_len}", rows=rows)


def contexts(batch: int, lengths: Sequence[int]) -> tuple[Case, ...]:
    return tuple(decode_shape(batch, n, 32, 8, 128) for n in lengths)


_LENGTHS = tuple(1 << exponent for exponent in range(10, 18))
CONTEXT: tuple[Case, ...] = (*contexts(1, _LENGTHS), *contexts(8, _LENGTHS), *contexts(64, _LENGTHS[:6]))
"""What the figure of the ceiling's share against the context shows: batch 1, 8 and 64."""
EXTRA: tuple[Case, ...] = (
    mixed(),
    float8(decode_shape(64, 4096, 32, 8, 128)),
    float8(decode_shape(1, 8192, 32, 8, 128)),
    drafts(decode_shape(16, 8192, 32, 8, 128), 4),
)
QUICK: tuple[Case, ...] = (DECODE_BENCH[1], DECODE_BENCH[4], mixed(), EXTRA[1])
DENSE: tuple[Case, ...] = tuple(
    replace(decode_shape(*shape, 128, page_size=0), causal=False)  # one query sees all keys: for peers' sake
    for shape in (
        (1, 2048, 32, 8),
        (1, 4096, 32, 32),
        (1, 8192, 32, 8),
        (1, 32768, 32, 8),
        (8, 4096, 32, 8),
        (64, 4096, 32, 8),
    )
)
"""What other libraries' calls of one query are handed: keys of each row in one piece."""
SUITES: dict[str, tuple[Case, ...]] = {
    "standard": (*DECODE_BENCH, *EXTRA),
    "context": CONTEXT,
    "all": tuple(dict.fromkeys((*DECODE_BENCH, *EXTRA, *CONTEXT))),
    "quick": QUICK,
    "dense": DENSE,
}
