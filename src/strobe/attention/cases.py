"""The shapes that tests, benchmarks and docs share, and fresh random inputs for them."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from strobe.attention.inputs import describe
from strobe.attention.problem import (
    LARGEST,
    UNLIMITED,
    AttentionProblem,
    Dense,
    Layout,
    Options,
    Packed,
    Paged,
)
from strobe.errors import ProblemError


@dataclass(frozen=True)
class Case:
    """One attention call to draw inputs for. `rows` holds `(q_len, kv_len)` of each batch row.

    `layout` is "dense" (all rows alike), "packed", "paged" (all q_len alike) or "paged_packed".
    `values` shapes the numbers: "normal", "large" (scores in the hundreds) or "equal" (all scores alike).
    """

    name: str
    rows: tuple[tuple[int, int], ...]
    q_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    layout: str = "dense"
    page_size: int = 16
    causal: bool = False
    window: tuple[int, int] = (UNLIMITED, UNLIMITED)
    scale: float | None = None
    softcap: float = 0.0
    sinks: bool = False
    values: str = "normal"

    def __post_init__(self) -> None:
        sizes = [size for row in self.rows for size in row]
        if max(sizes, default=0) > LARGEST or max(self.q_heads, self.head_dim, self.page_size) > LARGEST:
            raise ProblemError(f"{self.name}: supported: sizes up to {LARGEST}")
        if min(sizes, default=0) < 0 or min(self.q_heads, self.kv_heads, self.head_dim, self.page_size) < 1:
            raise ProblemError(
                f"{self.name}: supported: lengths from 0, heads, head_dim and page_size from 1"
            )

    def __str__(self) -> str:
        return self.name

    def inputs(
        self, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int | None = None
    ) -> Inputs:
        """Fresh inputs. The same seed gives the same numbers; None takes one from the case's name."""
        rng = torch.Generator().manual_seed(zlib.crc32(self.name.encode()) if seed is None else seed)
        q_lens, kv_lens = [q for q, _ in self.rows], [kv for _, kv in self.rows]
        packed_q = self.layout in ("packed", "paged_packed")
        q_shape = (sum(q_lens),) if packed_q else (len(self.rows), max(q_lens, default=0))
        q = self._draw((*q_shape, self.q_heads, self.head_dim), rng, dtype, device)
        layout, kv_shape, used = self._layout(q_lens, kv_lens, rng, device)
        k, v = (self._draw((*kv_shape, self.kv_heads, self.head_dim), rng, dtype, device) for _ in range(2))
        if used is not None:
            k[~used], v[~used] = float("nan"), float("nan")
        sinks = torch.randn(self.q_heads, generator=rng).to(device) if self.sinks else None
        options = {"causal": self.causal, "window": self.window, "scale": self.scale, "softcap": self.softcap}
        return Inputs(q, k, v, {**options, "sinks": sinks, "layout": layout})

    def _draw(
        self, shape: tuple[int, ...], rng: torch.Generator, dtype: torch.dtype, device: Any
    ) -> torch.Tensor:
        if self.values == "equal":
            return torch.ones(shape, dtype=dtype, device=device)
        spread = 8.0 if self.values == "large" else 1.0
        if torch.device(device).type == "cuda":
            on_device = torch.Generator(device).manual_seed(int(torch.randint(2**62, (1,), generator=rng)))
            return (torch.randn(shape, generator=on_device, device=device) * spread).to(dtype)
        return (torch.randn(shape, generator=rng) * spread).to(dtype)

    def _layout(
        self, q_lens: list[int], kv_lens: list[int], rng: torch.Generator, device: Any
    ) -> tuple[Layout, tuple[int, ...], torch.Tensor | None]:
        """(layout, k's leading shape, which page slots hold a key). Unused slots are poisoned with NaN."""

        def int32(values: Any) -> torch.Tensor:
            return torch.tensor(np.asarray(values), dtype=torch.int32, device=device)

        sums = int32(np.cumsum([0, *q_lens]))
        longest: dict[str, Any] = {"max_q_len": max(q_lens, default=0), "max_kv_len": max(kv_lens, default=0)}
        if self.layout == "dense":
            return Dense(), (len(self.rows), longest["max_kv_len"]), None
        if self.layout == "packed":
            return Packed(sums, int32(np.cumsum([0, *kv_lens])), **longest), (sum(kv_lens),), None
        counts = [-(-n // self.page_size) for n in kv_lens]
        pages = sum(counts) + 3
        shuffled = torch.randperm(pages, generator=rng)
        table = np.full((len(self.rows), max(counts, default=0) + 1), 2**31 - 1)
        used = torch.zeros(pages, self.page_size, dtype=torch.bool)
        first = 0
        for row, (count, kv_len) in enumerate(zip(counts, kv_lens, strict=True)):
            mine = shuffled[first : first + count]
            table[row, :count] = mine
            used[mine] = (torch.arange(count * self.page_size) < kv_len).view(count, self.page_size)
            first += count
        cu_seqlens_q = sums if self.layout == "paged_packed" else None
        layout = Paged(int32(table), int32(kv_lens), cu_seqlens_q, **longest)
        return layout, (pages, self.page_size), used.to(device)


@dataclass(frozen=True)
class Inputs:
    """Tensors of one call; `attention(i.q, i.k, i.v, **i.options)` runs it."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    options: dict[str, Any] = field(repr=False)

    @property
    def problem(self) -> AttentionProblem:
        return describe(self.q, self.k, self.v, Options(**self.options))


def _uniform(batch: int, q_len: int, kv_len: int) -> tuple[tuple[int, int], ...]:
    return ((q_len, kv_len),) * batch


_PLAIN = (
    Case("one_token", _uniform(1, 1, 1)),
    Case("one_query", _uniform(2, 1, 77)),
    Case("tile_exact", _uniform(1, 128, 128)),
    Case("tile_plus_one", _uniform(1, 129, 129)),
    Case("odd", _uniform(3, 113, 203)),
    Case("mha", _uniform(2, 65, 65), q_heads=3, kv_heads=3),
    Case("mqa", _uniform(1, 97, 97), q_heads=8, kv_heads=1),
    Case("long_keys", _uniform(1, 5, 1000)),
    Case("more_queries_than_keys", _uniform(2, 90, 33)),
    Case("no_keys", _uniform(2, 7, 0)),
    Case("scale", _uniform(1, 50, 70), scale=0.37),
    Case("scale_zero", _uniform(1, 50, 70), scale=0.0),
    Case("scale_negative", _uniform(1, 50, 70), scale=-0.37),
    Case("large_scores", _uniform(1, 70, 150), values="large"),
    Case("equal_scores", _uniform(1, 70, 150), values="equal"),
    Case("several_tiles", _uniform(1, 300, 520), q_heads=2, kv_heads=1),
)
_WINDOWS = (
    Case("window_left", _uniform(1, 150, 200), window=(32, 0)),
    Case("window_both", _uniform(1, 100, 180), window=(17, 40)),
    Case("window_zero", _uniform(2, 40, 40), window=(0, 0)),
    Case("window_causal", _uniform(1, 260, 300), causal=True, window=(100, UNLIMITED)),
    Case("window_right_only", _uniform(1, 100, 120), window=(UNLIMITED, 9)),
)
_SCORES = (
    Case("softcap", _uniform(1, 100, 140), softcap=20.0, causal=True),
    Case("sinks", _uniform(2, 60, 90), sinks=True, causal=True),
    Case("sinks_without_keys", _uniform(1, 9, 0), sinks=True),
    Case("softcap_sinks_window", _uniform(1, 130, 190), softcap=8.0, sinks=True, window=(40, 0)),
)
_MIXED_ROWS = ((5, 5), (130, 130), (0, 9), (1, 200), (64, 3), (17, 0), (200, 333))
_PACKED = (
    Case("packed", _MIXED_ROWS, layout="packed"),
    Case("packed_causal", _MIXED_ROWS, layout="packed", causal=True),
    Case("packed_window_sinks", _MIXED_ROWS, layout="packed", window=(20, 0), sinks=True),
)
_DECODE_ROWS = tuple((1, n) for n in (0, 1, 15, 16, 17, 250, 1033))
_PAGED = (
    Case("paged_decode", _DECODE_ROWS, layout="paged", causal=True, q_heads=8),
    Case("paged_decode_mha", _DECODE_ROWS, layout="paged", q_heads=3, kv_heads=3),
    Case("paged_decode_mqa", _DECODE_ROWS, layout="paged", causal=True, q_heads=16, kv_heads=1),
    Case("paged_page_1", _uniform(2, 1, 70), layout="paged", page_size=1),
    Case("paged_page_256", _uniform(2, 1, 700), layout="paged", page_size=256),
    Case("paged_step", tuple((1, n) for n in (1, 300, 33, 90)), layout="paged", causal=True),
    Case("paged_step_window", tuple((1, n) for n in (5, 300, 1030)), layout="paged", window=(50, 0)),
    Case("paged_step_mqa", tuple((1, n) for n in (257, 2)), layout="paged", q_heads=9, kv_heads=1),
    Case("paged_step_scale_zero", tuple((1, n) for n in (90, 7)), layout="paged", scale=0.0),
    Case("paged_step_scale_negative", tuple((1, n) for n in (90, 7)), layout="paged", scale=-0.37),
    Case("paged_draft", tuple((4, n) for n in (4, 100, 517)), layout="paged", causal=True),
    Case("paged_draft_16", tuple((16, n) for n in (3, 100, 517)), layout="paged", causal=True),
    Case("paged_decode_window", _DECODE_ROWS, layout="paged", causal=True, window=(64, UNLIMITED)),
    Case("paged_decode_softcap_sinks", _DECODE_ROWS, layout="paged", causal=True, softcap=15.0, sinks=True),
    Case("paged_prefill", tuple((64, n) for n in (64, 200, 333)), layout="paged", causal=True),
    Case("paged_packed", ((33, 33), (1, 90), (0, 5), (100, 260), (1, 1)), layout="paged_packed", causal=True),
    Case(
        "paged_packed_page_64",
        ((80, 300), (1, 129), (5, 64)),
        layout="paged_packed",
        page_size=64,
        causal=True,
    ),
    Case(
        "paged_packed_window",
        ((70, 150), (1, 90)),
        layout="paged_packed",
        causal=True,
        window=(30, UNLIMITED),
    ),
)


def _causal(cases: tuple[Case, ...]) -> tuple[Case, ...]:
    return tuple(replace(case, name=f"{case.name}_causal", causal=True) for case in cases)


CORRECTNESS: tuple[Case, ...] = (*_PLAIN, *_causal(_PLAIN), *_WINDOWS, *_SCORES, *_PACKED, *_PAGED)
"""What every rung is tested on, where it does not refuse. Vary `head_dim` and dtype with `replace`."""


def prefill_shape(batch: int, seq: int, q_heads: int, kv_heads: int, head_dim: int, causal: bool) -> Case:
    """A dense self-attention benchmark shape."""
    name = f"b{batch}_s{seq}_h{q_heads}_{kv_heads}_d{head_dim}_{'causal' if causal else 'full'}"
    return Case(name, _uniform(batch, seq, seq), q_heads, kv_heads, head_dim, causal=causal)


def decode_shape(
    batch: int, kv_len: int, q_heads: int, kv_heads: int, head_dim: int, page_size: int = 16
) -> Case:
    """A benchmark shape of one new token a row over a cache in pages, or a dense one (0)."""
    name = f"b{batch}_kv{kv_len}_h{q_heads}_{kv_heads}_d{head_dim}_p{page_size}"
    case = Case(name, _uniform(batch, 1, kv_len), q_heads, kv_heads, head_dim, causal=True)
    return replace(case, layout="paged", page_size=page_size) if page_size else case


PREFILL_BENCH: tuple[Case, ...] = (
    *(
        prefill_shape(16384 // seq, seq, 2048 // head_dim, 2048 // head_dim, head_dim, causal)
        for head_dim in (64, 128, 256)
        for causal in (False, True)
        for seq in (1024, 4096, 16384)
    ),
    prefill_shape(1, 8192, 32, 8, 128, True),
    prefill_shape(4, 2048, 32, 32, 128, True),
)
SMALL_BENCH: tuple[Case, ...] = (
    *(prefill_shape(1, seq, 32, 8, 128, True) for seq in (512, 1024, 2048)),
    *(prefill_shape(32, 512, 16, 16, 128, causal) for causal in (True, False)),
    *(
        Case(
            f"b1_q512_kv8192_h32_8_d128_{layout}{size}", ((512, 8192),), 32, 8, 128, layout, size, causal=True
        )
        for layout, size in (("dense", 16), ("paged", 16), ("paged", 128))
    ),
)
"""Where the host and the launch count as much as the work; and a chunk of a prompt against a cache."""
DECODE_BENCH: tuple[Case, ...] = (
    decode_shape(1, 4096, 32, 32, 128),
    decode_shape(1, 8192, 32, 8, 128),
    decode_shape(1, 131072, 32, 8, 128),
    decode_shape(16, 8192, 32, 8, 128),
    decode_shape(64, 4096, 32, 8, 128),
    decode_shape(128, 2048, 32, 8, 128),
    decode_shape(64, 1024, 32, 32, 128),
    decode_shape(8, 32768, 32, 8, 64),
    decode_shape(256, 1024, 32, 8, 128),
)
LADDER_SHAPES = tuple(
    prefill_shape(1, 4096, 2048 // head_dim, 2048 // head_dim, head_dim, causal)
    for causal in (False, True)
    for head_dim in (128, 64)
)
"""Where the ladder's rungs are compared with one another."""
STANDARD_BENCH: tuple[Case, ...] = (
    *(prefill_shape(32, 1024, 8, 8, head_dim, False) for head_dim in (32, 128)),
    *(
        prefill_shape(batch, tokens, 512 // head_dim, 512 // head_dim, head_dim, False)
        for head_dim in (64, 128)
        for batch, tokens in ((32, 512), (16, 1024), (8, 2048), (4, 4096))
    ),
    *(
        prefill_shape(batch, seq, 8, 8, 64, causal)
        for causal in (False, True)
        for batch, seq in ((4, 128), (8, 512), (16, 1024), (32, 2048), (64, 4096))
    ),
    prefill_shape(1, 2048, 32, 32, 64, False),
)
"""The shapes of other people's tables."""
