"""Every CUDA and Triton rung of the ladder, over the case table and over random problems.

Outputs are poisoned with NaN first. A rung is asked for its refusals before each case: what it refuses
it must not be given, what it accepts it must compute within the bound of strobe.attention.check.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch

from strobe.attention import ladder
from strobe.attention.api import empty_lse
from strobe.attention.cases import CORRECTNESS, Case, Inputs
from strobe.attention.check import Verdict, verdict
from strobe.attention.inputs import describe
from strobe.attention.ladder import Rung
from strobe.attention.problem import Options

pytestmark = pytest.mark.gpu

RUNGS = [rung for rung in ladder.PREFILL if "cuda_" in rung.name or "triton_" in rung.name]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
WITH_SCORE_MATRIX = ("torch_cuda_softmax", "cuda_split")
rungs = pytest.mark.parametrize("rung", RUNGS, ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def run(rung: Rung, inputs: Inputs, with_lse: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
    problem = inputs.problem
    out = torch.full_like(inputs.q, float("nan"), memory_format=torch.contiguous_format)
    lse = empty_lse(problem, inputs.q).fill_(float("nan")) if with_lse else None
    if out.numel():
        rung.run(problem, inputs.q, inputs.k, inputs.v, out, lse)
    return out, lse


def judge(rung: Rung, inputs: Inputs) -> Verdict:
    return verdict(inputs.problem, inputs.q, inputs.k, inputs.v, *run(rung, inputs))


def check_all(rung: Rung, cases: Iterable[Case], dtype: torch.dtype) -> None:
    """Run each case that the rung accepts; fail with every wrong one, skip where it accepts none."""
    wrong, accepted, reasons = [], 0, set()
    for case in cases:
        inputs = case.inputs(dtype, "cuda")
        if refused := rung.refusals(inputs.problem):
            reasons.update(refused)
            continue
        accepted += 1
        judged = judge(rung, inputs)
        if not judged.right:
            wrong.append(f"{case}: {judged}")
    assert not wrong, f"{len(wrong)} of {accepted} cases:\n" + "\n".join(wrong)
    if not accepted:
        pytest.skip(f"{rung} refuses: {'; '.join(sorted(reasons)[:3])}")


@rungs
@dtypes
@pytest.mark.parametrize("head_dim", [64, 128])
def test_case_table(rung: Rung, dtype: torch.dtype, head_dim: int) -> None:
    check_all(rung, (replace(case, head_dim=head_dim) for case in CORRECTNESS), dtype)


_EVERY_HEAD_DIM = ("odd", "odd_causal", "several_tiles_causal", "packed_causal", "paged_prefill")


@rungs
@pytest.mark.parametrize("head_dim", [16, 32, 40, 80, 96, 160, 192, 256, 320, 512, 1024])
def test_other_head_dims(rung: Rung, head_dim: int) -> None:
    cases = [replace(case, head_dim=head_dim) for case in CORRECTNESS if case.name in _EVERY_HEAD_DIM]
    check_all(rung, cases, torch.bfloat16)


def random_case(seed: int) -> Case:
    draw = random.Random(seed)
    kv_heads = draw.choice([1, 2, 3])
    return Case(
        f"random_{seed}",
        ((draw.randint(1, 400), draw.randint(0, 700)),) * draw.randint(1, 3),
        q_heads=kv_heads * draw.choice([1, 2, 4, 5]),
        kv_heads=kv_heads,
        head_dim=draw.choice([64, 128]),
        causal=draw.random() < 0.5,
        scale=draw.choice([None, 0.2]),
    )


@rungs
@dtypes
def test_random_problems(rung: Rung, dtype: torch.dtype) -> None:
    check_all(rung, (random_case(seed) for seed in range(24)), dtype)


def first_accepted(rung: Rung, case: Case) -> Inputs:
    """Inputs of the case in the first dtype that the rung takes."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        inputs = case.inputs(dtype, "cuda")
        if not rung.refusals(inputs.problem):
            return inputs
    pytest.skip(f"{rung} refuses {case}: {'; '.join(rung.refusals(inputs.problem))}")


PLAIN = Case("plain", ((200, 333),) * 2, q_heads=6, kv_heads=3, head_dim=64, causal=True)


@rungs
def test_strided_inputs(rung: Rung) -> None:
    """q, k and v as views into one fused projection, and rows that do not start on 16 bytes."""
    plain = first_accepted(rung, replace(PLAIN, rows=((150, 150),) * 2, kv_heads=6))
    for extra in (0, 1):
        fused = torch.randn(2, 150, 18, 64 + extra, device="cuda").to(plain.q.dtype)[..., extra:]
        q, k, v = fused.split(6, dim=2)
        inputs = Inputs(q, k, v, plain.options)
        judged = judge(rung, inputs)
        assert judged.right, f"rows {extra} elements off: {judged}"


@rungs
def test_same_inputs_give_the_same_bits(rung: Rung) -> None:
    inputs = first_accepted(rung, PLAIN)
    first_out, first_lse = run(rung, inputs)
    for _ in range(3):
        out, lse = run(rung, inputs)
        assert torch.equal(out, first_out)
        assert torch.equal(lse, first_lse)


@pytest.mark.parametrize("rung", [rung for rung in RUNGS if rung.name not in WITH_SCORE_MATRIX], ids=str)
def test_memory_grows_no_faster_than_the_length(rung: Rung) -> None:
    """What a fused rung takes beyond inputs and outputs; the score matrix would grow by 16."""
    extra = []
    for length in (2048, 8192):
        inputs = first_accepted(rung, Case("long", ((length, length),), 4, 4, 64, causal=True))
        problem, out = inputs.problem, torch.empty_like(inputs.q)
        rung.run(problem, inputs.q, inputs.k, inputs.v, out, None)
        gc.collect()  # what earlier tests left in cycles would be freed in between
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        rung.run(problem, inputs.q, inputs.k, inputs.v, out, None)
        extra.append(torch.cuda.max_memory_allocated() - before)
    assert extra[1] <= 4 * extra[0] + 4096


@rungs
def test_lse_is_optional(rung: Rung) -> None:
    inputs = first_accepted(rung, PLAIN)
    out, _ = run(rung, inputs, with_lse=False)
    assert verdict(inputs.problem, inputs.q, inputs.k, inputs.v, out).right


@rungs
def test_graph_replay_reads_the_new_inputs(rung: Rung) -> None:
    inputs = first_accepted(rung, PLAIN)
    problem, out = inputs.problem, torch.empty_like(inputs.q)
    rung.run(problem, inputs.q, inputs.k, inputs.v, out, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rung.run(problem, inputs.q, inputs.k, inputs.v, out, None)
    for tensor in (inputs.q, inputs.k, inputs.v):
        tensor.copy_(torch.randn_like(tensor))
    out.fill_(float("nan"))
    graph.replay()
    assert verdict(problem, inputs.q, inputs.k, inputs.v, out).right


def other_tiles(rung: Rung) -> list[Any]:
    """Tiles away from the default, by changing one size at a time to half and twice."""
    default = rung.module.DEFAULT
    sizes = {name: size for name, size in vars(default).items() if isinstance(size, int)}
    return [
        replace(default, **{name: other}) for name, size in sizes.items() for other in (size // 2, size * 2)
    ]


@pytest.mark.parametrize("rung", [rung for rung in RUNGS if hasattr(rung.module, "DEFAULT")], ids=str)
def test_other_tiles(rung: Rung) -> None:
    inputs = first_accepted(rung, PLAIN)
    problem, ran = inputs.problem, 0
    for tile in other_tiles(rung):
        if rung.module.refusals_for_tile(problem, tile):
            continue
        ran += 1
        out = torch.full_like(inputs.q, float("nan"))
        rung.module.run(problem, inputs.q, inputs.k, inputs.v, out, None, tile=tile)
        judged = verdict(problem, inputs.q, inputs.k, inputs.v, out)
        assert judged.right, f"{tile}: {judged}"
    assert ran, "no other tile is accepted"


def test_split_kv_splits_do_not_matter() -> None:
    from strobe.attention.prefill import cuda_split_kv

    case = Case("few_queries", ((3, 5000),), q_heads=2, kv_heads=1, causal=True)
    inputs = case.inputs(torch.bfloat16, "cuda")
    problem = describe(inputs.q, inputs.k, inputs.v, Options(**inputs.options))
    for splits in (1, 2, 7, 64):
        out = torch.full_like(inputs.q, float("nan"))
        tile = cuda_split_kv.Tile(splits=splits)
        cuda_split_kv.run(problem, inputs.q, inputs.k, inputs.v, out, None, tile=tile)
        judged = verdict(problem, inputs.q, inputs.k, inputs.v, out)
        assert judged.right, f"{splits} splits: {judged}"
