"""Projections that rotate and append their heads: inputs, and the formula in float64 that judges."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from strobe.linear import Projection
from strobe.models.config import Rope
from strobe.ops import cache, rope

FP8 = torch.float8_e4m3fn


class Heads(NamedTuple):
    """Of queries and of keys, and their size."""

    q: int
    kv: int
    dim: int


KINDS: list[tuple[Heads, int, int, dict[str, Any]]] = [
    (Heads(4, 1, 64), 1, 16, {"normed": True}),
    (Heads(3, 3, 128), 2, 1, {"biased": True, "rope": Rope(5e5, "llama3", 8.0)}),
    (Heads(7, 1, 128), 16, 256, {"biased": True, "normed": True}),
    (Heads(4, 2, 96), 5, 3, {"rope": Rope(1e4, "linear", 4.0)}),
    (Heads(2, 2, 80), 13, 16, {"normed": True, "dtype": torch.float16}),
    (Heads(3, 1, 256), 8, 16, {"kv_dtype": FP8, "normed": True}),
    (Heads(8, 2, 6), 3, 5, {"kv_dtype": FP8, "scaled": True, "biased": True}),
]
"""Heads, tokens, page size, and what `draw` takes."""


@dataclass(frozen=True)
class Case:
    """A projection, its inputs, and a cache of random pages that some tokens are appended to."""

    heads: Heads
    projection: Projection
    x: torch.Tensor
    positions: torch.Tensor
    frequencies: list[float]
    before: torch.Tensor
    to: cache.Destination

    def formula(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k and v in float64, turned by the cosines and sines as they were rounded."""
        p, x, (q_heads, kv_heads, dim) = self.projection, self.x.double(), self.heads
        if p.norm is not None:
            x = x / (x.square().mean(-1, keepdim=True) + p.norm_eps).sqrt() * p.norm.double()
        out = x @ p.weight.double().t() + (0 if p.bias is None else p.bias.double())
        qk, v = out.view(len(x), -1, dim).split_with_sizes((q_heads + kv_heads, kv_heads), 1)
        cos, sin = (each[..., dim // 2 :].double() for each in self.to.turn)
        first, second = qk.chunk(2, -1)
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
        assert (turned - rope.rotate_reference(qk, self.positions, self.frequencies)).abs().max() < 0.5
        return turned[:, :q_heads], turned[:, q_heads:], v

    def check(self, q: torch.Tensor) -> None:
        """q and the tokens' slots hold the formula's, all other slots what they held."""
        want_q, *want_kv = self.formula()
        eps = torch.finfo(self.x.dtype).eps
        assert (q.double() - want_q).abs().max() <= 2 * eps * want_q.abs().max()
        to, scales = self.to, self.to.options.scales or (None, None)
        for stored, before, want, scale in zip(
            (to.k_pages, to.v_pages), self.before, want_kv, scales, strict=True
        ):
            now, was = stored.flatten(0, 1), before.flatten(0, 1)
            got = now.float()[to.slots].double() * (1 if scale is None else scale.double()[:, None])
            rounding = 2**-4 * want.abs() + 2**-10 if stored.dtype == FP8 else 0
            assert ((got - want).abs() <= rounding + 2 * eps * want.abs().max()).all()
            others = torch.ones(len(now), dtype=torch.bool, device=now.device).index_fill_(0, to.slots, False)
            assert torch.equal(now.view(torch.uint8)[others], was.view(torch.uint8)[others])


def draw(heads: Heads, tokens: int, page_size: int, *, device: str = "cpu", **kind: Any) -> Case:
    """`kind`: biased, normed, scaled (a float8 cache has scales), rope, dtype, kv_dtype, inputs."""
    inputs, rotation = kind.get("inputs", 8 * random.randint(1, 40)), kind.get("rope", Rope())
    dtype = kind.get("dtype", torch.bfloat16)
    outputs, pages = (heads.q + 2 * heads.kv) * heads.dim, -(-(tokens + 5) // page_size)
    with torch.device(device):
        projection = Projection(
            (torch.randn(outputs, inputs) * inputs**-0.5).to(dtype),
            bias=torch.randn(outputs).to(dtype) if kind.get("biased") else None,
            norm=(torch.rand(inputs) + 0.5).to(dtype) if kind.get("normed") else None,
            norm_eps=1e-5,
        )
        positions, frequencies = torch.randint(5000, (tokens,)), rotation.frequencies(heads.dim)
        turn = rope.angles(positions, rope.signed(frequencies, device), dtype)
        before = torch.randn(2, pages, page_size, heads.kv, heads.dim).to(kind.get("kv_dtype", dtype))
        scales = (torch.rand(heads.kv) + 0.1, torch.rand(heads.kv) + 0.1) if kind.get("scaled") else None
        slots, stored = torch.randperm(pages * page_size)[:tokens], before.clone()
        x = (2 * torch.randn(tokens, inputs)).to(dtype)
    to = cache.Destination(turn, stored[0], stored[1], slots, cache.Options(scales=scales))
    return Case(heads, projection, x, positions, frequencies, before, to)
