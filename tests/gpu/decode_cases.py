"""What test_decode_rungs.py runs: the production rungs' variants, and the cases."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from strobe.attention import paged
from strobe.attention.api import empty_lse
from strobe.attention.cases import Case, Inputs
from strobe.attention.check import verdict
from strobe.attention.decode import cuda_cluster, cuda_paged
from strobe.attention.problem import UNLIMITED, AttentionProblem, Dense, Paged
from strobe.cuda import jit


@dataclass(frozen=True)
class Variant:
    """A production rung and what differs from the shape that it chooses."""

    name: str
    rung: Any
    changes: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def shape(self, problem: AttentionProblem) -> Any:
        return replace(self.rung.choose_shape(problem), **self.changes)

    def run(self, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        problem = inputs.problem
        reasons = self.rung.refusals(problem)
        if reasons and torch.cuda.get_device_capability() < (9, 0):
            pytest.skip(f"{self.rung.__name__} refuses: {'; '.join(reasons)}")
        assert not reasons, problem
        out = torch.full_like(inputs.q, float("nan"), memory_format=torch.contiguous_format)
        lse = empty_lse(problem, inputs.q).fill_(float("nan"))
        self.rung.run(problem, inputs.q, inputs.k, inputs.v, out, lse, self.shape(problem))
        return out, lse

    def wrong(self, inputs: Inputs) -> str | None:
        judged = verdict(inputs.problem, inputs.q, inputs.k, inputs.v, *self.run(inputs))
        return None if judged.right else str(judged)


VARIANTS = (
    Variant("paged", cuda_paged),
    Variant("paged_settled", cuda_paged, {"settled": True}),
    Variant("cluster", cuda_cluster),
    Variant("cluster_settled", cuda_cluster, {"settled": True}),
    Variant("cluster_of_2", cuda_cluster, {"cluster": 2}),
)
PLAIN_VARIANTS = (VARIANTS[0], VARIANTS[2])

PLAIN = Case("plain", ((1, 500), (1, 700), (1, 333)), 8, 2, 128, "paged", causal=True)
ONE_ROW = Case("one_row", ((1, 8192),), 32, 8, 128, "paged", causal=True)
RAGGED = Case(
    "ragged",
    ((1, 900), (0, 1300), (7, 7), (2, 0), (0, 64), (5, 2000)),
    32,
    2,
    128,
    "paged_packed",
    causal=True,
)
LONG = tuple(
    Case(name, tuple((1, n) for n in lens), *heads, "paged", causal=True)
    for name, lens, heads in (
        ("long", [70_000], (32, 8, 128)),
        ("heads", [9_001, 8_864, 8_727], (8, 8, 64)),
        ("one_head", [20_000], (16, 1, 128)),
        ("two_heads", [50_000, 70], (8, 2, 64)),
        ("whole_segments", [700 - i for i in range(64)], (32, 8, 128)),
        ("batch", [1_500 - 7 * i for i in range(70)], (16, 4, 128)),
        ("one_long_row", [40_000, *(37 * i % 900 for i in range(90))], (8, 2, 128)),
    )
)
FP8_SHAPES = [
    (64, 5, "float16"),
    (80, 1, "bfloat16"),
    (80, 5, "float16"),
    (96, 1, "bfloat16"),
    (128, 1, "bfloat16"),
    (128, 5, "float16"),
    (192, 5, "bfloat16"),
    (256, 1, "float16"),
]


def fp8_case(head_dim: int, q_len: int) -> Case:
    lens = (0, 1, 15, 16, 17, 400, 2111)
    return Case("fp8", tuple((q_len, n) for n in lens), 8, 2, head_dim, "paged", causal=True)


def in_float8(inputs: Inputs) -> Inputs:
    """The cache in float8 with a scale a head; NaN stays NaN."""
    k, v = inputs.k.to(torch.float8_e4m3fn), inputs.v.to(torch.float8_e4m3fn)
    k_scale, v_scale = torch.rand(2, k.shape[2], device=k.device).add_(0.25)
    layout = replace(inputs.options["layout"], k_scale=k_scale, v_scale=v_scale)
    return Inputs(inputs.q, k, v, {**inputs.options, "layout": layout})


def random_case(seed: int) -> Case:
    """Lengths around page borders, any page size, group, chunk, window, softcap and sinks."""
    draw = random.Random(seed)
    page_size = draw.choice([1, 2, 5, 16, 16, 48, 64, 100, 256])
    kv_heads = draw.choice([1, 2, 4])
    packed = draw.random() < 0.3
    q_len = draw.choice([1, 1, 1, 2, 4, 7, 16])
    lens = [0, 1, page_size - 1, page_size, page_size + 1, draw.randint(1, 3000), draw.randint(1, 300)]
    rows = tuple(
        (draw.randint(0 if i else 1, q_len) if packed else q_len, n)
        for i, n in enumerate(draw.sample(lens, draw.randint(1, 7)))
    )
    return Case(
        f"random_{seed}",
        rows,
        q_heads=kv_heads * draw.choice([1, 2, 3, 4, 8, 16]),
        kv_heads=kv_heads,
        head_dim=draw.choice(paged.HEAD_DIMS),
        layout="paged_packed" if packed else "paged",
        page_size=page_size,
        causal=draw.random() < 0.8,
        window=(draw.choice([UNLIMITED, UNLIMITED, 0, 40]), draw.choice([UNLIMITED, 0, 3])),
        softcap=draw.choice([0.0, 0.0, 15.0]),
        sinks=draw.random() < 0.3,
        values=draw.choice(["normal", "normal", "large", "equal"]),
    )


RANDOM, OTHER_RANDOM = random_case(3), random_case(11)


def random_dense(seed: int) -> Case:
    """Rows of one odd length, up to 16 queries each, window, softcap and sinks."""
    draw = random.Random(seed)
    kv_heads = draw.choice([1, 2, 4])
    return Case(
        f"random_dense_{seed}",
        ((draw.choice([1, 1, 3, 16]), draw.choice([1, 15, 16, 17, draw.randint(1, 300)])),)
        * draw.randint(1, 4),
        q_heads=kv_heads * draw.choice([1, 3, 4, 8]),
        kv_heads=kv_heads,
        head_dim=draw.choice(paged.HEAD_DIMS),
        causal=draw.random() < 0.7,
        window=(draw.choice([UNLIMITED, UNLIMITED, 0, 40]), draw.choice([UNLIMITED, 0, 3])),
        softcap=draw.choice([0.0, 0.0, 15.0]),
        sinks=draw.random() < 0.3,
        values=draw.choice(["normal", "normal", "large"]),
    )


STRIDES = ("tokens", "heads", "rows off 16 bytes", "start off 16 bytes", "expanded")
"""How a dense tensor may lie in memory; bulk copies can read the first two."""


def strided(inputs: Inputs, how: str) -> Inputs:
    """The same call, its tensors in other strides, NaN wherever there is no row of theirs."""
    return Inputs(*(_strided(x, how) for x in (inputs.q, inputs.k, inputs.v)), inputs.options)


def _strided(x: torch.Tensor, how: str) -> torch.Tensor:
    batch, length, heads, dim = x.shape

    def room(*shape: int) -> torch.Tensor:
        return torch.full(shape, float("nan"), dtype=x.dtype, device=x.device)

    if how == "expanded":
        return x[:, :, :1].expand_as(x)
    place = {
        "tokens": lambda: room(batch, length + 5, heads, dim)[:, :length],
        "heads": lambda: room(batch, heads, length + 5, dim)[:, :, :length].transpose(1, 2),
        "rows off 16 bytes": lambda: room(batch, length, heads, dim + 1)[..., :dim],
        "start off 16 bytes": lambda: room(x.numel() + 1)[1:].view(x.shape),
    }[how]()
    return place.copy_(x)


def problem_of(case: Case, dtype: str = "bfloat16", kv_dtype: str | None = None) -> AttentionProblem:
    """What decides a case's shape, without its data."""
    return AttentionProblem(
        batch=len(case.rows),
        q_len=max(q for q, _ in case.rows),
        kv_len=max(kv for _, kv in case.rows),
        q_heads=case.q_heads,
        kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        dtype=dtype,
        kv_dtype=kv_dtype,
        window=case.window,
        softcap=case.softcap,
        sinks=True if case.sinks else None,
        layout=Dense() if case.layout == "dense" else Paged(None, None),
        page_size=0 if case.layout == "dense" else case.page_size,
    )


def compile_all(jobs: Iterable[tuple[Variant, AttentionProblem]]) -> None:
    """Side by side: most of these tests' time is the compiler's."""
    jit.warm([variant.rung.source(variant.shape(problem)) for variant, problem in jobs], jit.arch_of())
