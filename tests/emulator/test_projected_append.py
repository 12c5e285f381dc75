"""The projection that rotates and appends its heads, in the emulator, against the formula in float64."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import pytest
import torch
from cuda_emulator import emulated_gpu

from strobe.cuda import jit
from strobe.linear import Projection, cuda_skinny
from strobe.linear.problem import Append, LinearProblem
from strobe.models.config import Rope
from strobe.ops import cache, rope

FP8 = torch.float8_e4m3fn


class Heads(NamedTuple):
    q: int
    kv: int
    dim: int


class Case(NamedTuple):
    """A projection, its inputs, and a cache of random pages that some tokens are appended to."""

    projection: Projection
    x: torch.Tensor
    positions: torch.Tensor
    frequencies: list[float]
    before: torch.Tensor
    to: cache.Destination

    @property
    def pages(self) -> torch.Tensor:
        return torch.stack((self.to.k_pages, self.to.v_pages))


def draw_case(heads: Heads, tokens: int, page_size: int, **kind: Any) -> Case:
    """`kind`: biased, normed, scaled (a float8 cache has scales), rope, dtype, kv_dtype."""
    inputs = 8 * random.randint(1, 40)
    dtype = kind.get("dtype", torch.bfloat16)
    kv_dtype = kind.get("kv_dtype", dtype)
    outputs, pages = (heads.q + 2 * heads.kv) * heads.dim, -(-(tokens + 5) // page_size)
    projection = Projection(
        (torch.randn(outputs, inputs) * inputs**-0.5).to(dtype),
        bias=torch.randn(outputs).to(dtype) if kind.get("biased") else None,
        norm=(torch.rand(inputs) + 0.5).to(dtype) if kind.get("normed") else None,
        norm_eps=1e-5,
    )
    positions = torch.randint(5000, (tokens,))
    frequencies = kind.get("rope", Rope()).frequencies(heads.dim)
    turn = rope.angles(positions, rope.signed(frequencies, "cpu"), dtype)
    before = torch.randn(2, pages, page_size, heads.kv, heads.dim).to(kv_dtype)
    stored = before.clone()
    scales = (torch.rand(heads.kv) + 0.1, torch.rand(heads.kv) + 0.1) if kind.get("scaled") else None
    slots = torch.randperm(pages * page_size)[:tokens]
    to = cache.Destination(turn, stored[0], stored[1], slots, cache.Options(scales=scales))
    return Case(projection, (2 * torch.randn(tokens, inputs)).to(dtype), positions, frequencies, before, to)


def formula(case: Case, heads: Heads) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v in float64, turned by the cosines and sines as they were rounded."""
    p, x = case.projection, case.x.double()
    if p.norm is not None:
        x = x / (x.square().mean(-1, keepdim=True) + p.norm_eps).sqrt() * p.norm.double()
    out = x @ p.weight.double().t() + (0 if p.bias is None else p.bias.double())
    qk, v = out.view(len(x), -1, heads.dim).split_with_sizes((heads.q + heads.kv, heads.kv), 1)
    cos, sin = (each[..., heads.dim // 2 :].double() for each in case.to.turn)
    first, second = qk.chunk(2, -1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    assert (turned - rope.rotate_reference(qk, case.positions, case.frequencies)).abs().max() < 0.5
    return turned[:, : heads.q], turned[:, heads.q :], v


def append(case: Case, heads: Heads, sm_count: int = 3, **around: bool) -> torch.Tensor:
    """The queries that the kernel leaves."""
    dtype, kv_dtype = (str(each).removeprefix("torch.") for each in (case.x.dtype, case.to.k_pages.dtype))
    p = case.projection
    problem = LinearProblem(
        *(len(case.x), p.weight.shape[1], len(p.weight), dtype),
        bias=p.bias is not None,
        norm=p.norm is not None,
        append=Append(*heads, kv_dtype),
        device="cuda",
        arch=90,
        **around,
    )
    assert not cuda_skinny.refusals(problem)
    q = torch.full((len(case.x), heads.q, heads.dim), float("nan"), dtype=case.x.dtype)
    with emulated_gpu(sm_count=sm_count):
        cuda_skinny.append(problem, case.x, p, case.to, q)
    return q


def check(case: Case, heads: Heads, q: torch.Tensor, drawn: str = "") -> None:
    """Queries and the tokens' slots hold the formula's, all other slots what they held."""
    want_q, *want_kv = formula(case, heads)
    eps = torch.finfo(case.x.dtype).eps
    assert (q.double() - want_q).abs().max() <= 2 * eps * want_q.abs().max(), drawn
    slots, scales = case.to.slots, case.to.options.scales or (None, None)
    for stored, before, want, scale in zip(case.pages, case.before, want_kv, scales, strict=True):
        now, was = stored.flatten(0, 1), before.flatten(0, 1)
        got = now.float()[slots].double() * (1 if scale is None else scale.double()[:, None])
        rounding = 2**-4 * want.abs() + 2**-10 if stored.dtype == FP8 else 0
        assert ((got - want).abs() <= rounding + 2 * eps * want.abs().max()).all(), drawn
        others = torch.ones(len(now), dtype=torch.bool).index_fill_(0, slots, False)
        assert torch.equal(now.view(torch.uint8)[others], was.view(torch.uint8)[others]), drawn


@pytest.mark.parametrize(
    ("heads", "tokens", "page_size", "kind"),
    [
        (Heads(4, 1, 64), 1, 16, {"normed": True}),
        (Heads(3, 3, 128), 2, 1, {"biased": True, "rope": Rope(5e5, "llama3", 8.0)}),
        (Heads(7, 1, 128), 16, 256, {"biased": True, "normed": True}),
        (Heads(4, 2, 96), 5, 3, {"rope": Rope(1e4, "linear", 4.0)}),
        (Heads(2, 2, 80), 13, 16, {"normed": True, "dtype": torch.float16}),
        (Heads(3, 1, 256), 8, 16, {"kv_dtype": FP8, "scaled": True}),
        (Heads(8, 2, 6), 3, 5, {"kv_dtype": FP8, "normed": True, "biased": True}),
    ],
    ids=str,
)
def test_equals_the_formula(heads: Heads, tokens: int, page_size: int, kind: dict[str, Any]) -> None:
    seed = random.randrange(2**31)
    torch.manual_seed(seed)
    case = draw_case(heads, tokens, page_size, **kind)
    check(case, heads, append(case, heads, sm_count=random.randint(1, 5)), f"{seed=}")


def test_rows_that_only_pad_share_a_slot() -> None:
    """A graph's: equal tokens, all written to one slot, beside others."""
    torch.manual_seed(1)
    heads, tokens = Heads(4, 2, 64), 8
    case = draw_case(heads, tokens, 4, normed=True)
    for each in (case.x, case.positions, *case.to.turn, case.to.slots):
        each[3:] = each[3].clone()
    q = append(case, heads)
    assert torch.equal(q[3:], q[3:4].expand(5, -1, -1))
    check(case, heads, q)


def test_a_call_uses_its_own_addresses() -> None:
    """The packed launch is kept, the cache that it writes to is not."""
    torch.manual_seed(2)
    heads = Heads(2, 1, 64)
    first = draw_case(heads, 2, 4)
    again = draw_case(heads, 2, 4)._replace(projection=first.projection, x=first.x.flip(0))
    for case in (first, again):
        check(case, heads, append(case, heads))
    assert len(first.projection.scratch) == 1


@pytest.mark.parametrize("head_norms", [False, True])
@pytest.mark.parametrize("tokens", [4, 17])
def test_one_launch_or_two(tokens: int, head_norms: bool) -> None:
    """What the kernel refuses is projected by a rung that does not, and appended by a launch behind it."""
    torch.manual_seed(tokens)
    heads = Heads(4, 2, 64)
    case = draw_case(heads, tokens, 16, biased=True, normed=True)
    to = case.to
    if head_norms:
        ones = torch.ones(64).bfloat16()
        options = cache.Options(cache.HeadNorms(ones, ones, 1e6))  # the factor is 1 / 1000 for every head
        to = cache.Destination(to.turn, to.k_pages, to.v_pages, to.slots, options)
    launched = []
    with emulated_gpu(), pytest.MonkeyPatch.context() as patch:
        kernel = jit.kernel
        patch.setattr(jit, "kernel", lambda *args: launched.append(args[1]) or kernel(*args))
        q = case.projection.append(case.x, to, "cuda_skinny,torch_linear")
    fused = tokens <= 16 and not head_norms
    assert ("append" in launched) is not fused
    assert ("project" in launched) is (tokens <= 16)
    if head_norms:
        q, to.k_pages[:] = 1000 * q, 1000 * to.k_pages
        case.before[0] *= 1000
    check(case, heads, q)
