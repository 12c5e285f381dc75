"""Two hundred problems for the Hopper rung that nobody chose: lengths, heads, masks and layouts at random."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from judged import judged

from strobe.attention.cases import Case
from strobe.attention.prefill import cuda_hopper
from strobe.cuda import jit
from strobe.device import gpu

pytestmark = pytest.mark.gpu

KINDS: tuple[dict[str, Any], ...] = (
    {"causal": True},
    {"causal": False},
    {"window": (90, 7), "softcap": 15.0, "sinks": True},
    {"layout": "packed", "causal": True},
    {"layout": "paged_packed", "page_size": 16, "causal": True, "sinks": True},
    {"layout": "paged", "page_size": 64, "window": (40, 0), "softcap": 15.0},
)
EACH = 7


def random_case(draw: random.Random, head_dim: int, kind: dict[str, Any]) -> Case:
    def row() -> tuple[int, int]:
        return draw.choice([1, 2, draw.randint(1, 500)]), draw.choice([0, 1, 64, draw.randint(0, 900)])

    rows = [row() for _ in range(draw.randint(1, 4))]
    if kind.get("layout", "dense") == "dense":
        rows = rows[:1] * len(rows)
    elif kind["layout"] == "paged":
        rows = [(rows[0][0], kv_len) for _, kv_len in rows]
    kv_heads = draw.choice([1, 2, 3])
    return Case("random", tuple(rows), kv_heads * draw.choice([1, 2, 4, 5]), kv_heads, head_dim, **kind)


@pytest.mark.parametrize("head_dim", cuda_hopper.HEAD_DIMS)
def test_random_problems(head_dim: int) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    seed = random.randrange(2**31)
    draw, sms = random.Random(seed), gpu(torch.cuda.current_device()).sm_count
    cases = [random_case(draw, head_dim, kind) for kind in KINDS for _ in range(EACH)]
    drawn = []
    for number, case in enumerate(cases):
        dtype = draw.choice([torch.bfloat16, torch.float16])
        drawn.append(case.inputs(dtype, "cuda", seed=seed + number))
    problems = [inputs.problem for inputs in drawn]
    tiles = [cuda_hopper.choose_tile(problem, sms) for problem in problems]
    defines = map(cuda_hopper.defines, problems, tiles)
    jit.warm([jit.Source(cuda_hopper._SOURCE, each) for each in defines], jit.arch_of())
    wrong = []
    for case, inputs, problem in zip(cases, drawn, problems, strict=True):
        assert not cuda_hopper.refusals(problem)
        found = judged(cuda_hopper.run, inputs)
        if not found.right:
            wrong.append(f"{case!r}: {found}")
    assert not wrong, f"seed {seed}, {len(wrong)} of {len(cases)}:\n" + "\n".join(wrong)
