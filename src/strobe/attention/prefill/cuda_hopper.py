"""FlashAttention for Hopper's own units: bulk copies, warpgroup products, warps with a role each.

Sources: Dao 2023 (arXiv 2307.08691); Shah et al. 2024, FlashAttention-3 (arXiv 2407.08608) for producer
and consumers, turns, and the overlap of products and softmax. The head of cuda_hopper.cu
tells what is our own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from strobe.attention import dense
from strobe.attention.plan import Run, contiguous_strides
from strobe.attention.prefill.cuda_hopper_launch import (
    ROWS,
    Launch,
    Maps,
    OffSixteenBytes,
    Params,
    readable,
)
from strobe.attention.problem import UNLIMITED, AttentionProblem, Dense, Packed
from strobe.cuda import jit
from strobe.device import gpu

IDEA = "two warps copy in bulk; warpgroups take turns at the tensor cores, softmax under the other's products"

HEAD_DIMS = (64, 96, 128, 192, 256)
_SOURCE = Path(__file__).with_suffix(".cu")
_STAGES = 2
_BARRIERS_BYTES = 2048


@dataclass(frozen=True)
class Tile:
    """How a block works: `consumers` warpgroups of 64 queries, `keys` at a time, `q_stages` tiles of q.

    `bulk_store` lets the copy engine store. `folded` has a block work on one tile alone, 64 queries from
    the front of a head and 64 from its back, so that blocks have equal work.
    """

    consumers: int = 2
    keys: int = 128
    q_stages: int = 2
    bulk_store: bool = False
    folded: bool = False

    @property
    def queries(self) -> int:
        return ROWS * self.consumers

    @property
    def threads(self) -> int:
        return 128 * (self.consumers + 1)

    def shared_bytes(self, head_dim: int) -> int:
        """q, the stages of keys and values, the barriers."""
        rows = self.q_stages * self.queries + 2 * _STAGES * self.keys
        return 2 * head_dim * rows + _BARRIERS_BYTES


TILES = {
    64: Tile(),
    96: Tile(),
    128: Tile(),
    192: Tile(keys=64, q_stages=1),
    256: Tile(keys=64, q_stages=1),
}
_THREE = Tile(consumers=3, bulk_store=True)
_BULK = Tile(q_stages=3, bulk_store=True)


def choose_tile(problem: AttentionProblem, sm_count: int) -> Tile:
    """Measured on an H200 (docs/log.md).

    Stores in bulk pay at head_dim 128 while rows are short, with a third tile of q to load meanwhile. At
    head_dim 64 the exponentials take as long as the products (docs/math.md, eq. 9), and a third consumer
    keeps both busier; it has no registers to spare for anything but plain problems, and is too coarse for
    short causal ones.
    """
    tile = TILES[problem.head_dim]
    if not isinstance(problem.layout, Dense):
        return tile
    if problem.head_dim == 128 and problem.kv_len < 4096:
        tile = _BULK
    if _folds(problem) and -(-problem.q_len // tile.queries) * problem.batch * problem.q_heads <= sm_count:
        return replace(tile, folded=True)
    if problem.head_dim == 64 and not problem.softcap and problem.sinks is None:
        if not problem.masked and problem.q_len > 2 * _THREE.queries:
            return _THREE
        if problem.window == (UNLIMITED, 0) and problem.q_len >= 2048:
            return _THREE
    return tile


def refusals(problem: AttentionProblem) -> list[str]:
    reasons = []
    if problem.arch != 90:
        reasons.append("needs a GPU of compute capability 9.0 (H100, H200)")
    if problem.dtype not in ("float16", "bfloat16"):
        reasons.append(f"dtype {problem.dtype}; supported: float16, bfloat16")
    elif problem.kv_dtype != problem.dtype:
        reasons.append(f"k and v in {problem.kv_dtype}; supported: q's dtype")
    if problem.head_dim not in HEAD_DIMS:
        reasons.append(f"head_dim {problem.head_dim}; supported: {', '.join(map(str, HEAD_DIMS))}")
    elif problem.paged:
        keys = TILES[problem.head_dim].keys
        if problem.page_size % 8 or (keys % problem.page_size and problem.page_size % keys):
            sizes = ", ".join(str(n) for n in (8, 16, 32, 64) if n < keys)
            reasons.append(f"page_size {problem.page_size}; supported: {sizes} and multiples of {keys}")
    if not problem.scale or problem.scale < 0:
        reasons.append(f"scale {problem.scale}; supported: above 0")
    return reasons


def refusals_for_tile(problem: AttentionProblem, tile: Tile) -> list[str]:
    """Why this problem cannot be worked on in such a way."""
    if tile.consumers not in (2, 3) or tile.keys not in (64, 96, 128) or tile.q_stages not in (1, 2, 3):
        return [f"{tile}; supported: consumers 2, 3; keys 64, 96, 128; q_stages 1 to 3"]
    reasons = dense.refusals_of(dense.Footprint(tile.threads, tile.shared_bytes(problem.head_dim)), problem)
    if problem.paged and tile.keys % problem.page_size and problem.page_size % tile.keys:
        reasons.append(f"keys {tile.keys} in pages of {problem.page_size}; supported: one divides the other")
    if tile.folded and (tile.consumers != 2 or not _folds(problem)):
        reasons.append("folded; supported: consumers 2, dense, causal, a key for every query")
    if tile.bulk_store and (problem.packed_q or tile.q_stages < 2):
        reasons.append("bulk_store; supported: q not packed, q_stages 2, 3")
    return reasons


def run(
    problem: AttentionProblem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    tile: Tile | None = None,
) -> None:
    q, k, v = (x if readable(x) else x.clone(memory_format=torch.contiguous_format) for x in (q, k, v))
    room = dense.aligned(out)
    lse_strides = (0, 0) if lse is None else lse.stride()
    launch, _held = _packed(problem, q, k, v, room.stride(), lse_strides, tile or _chosen(problem, q))
    launch.run(q, k, v, room, lse)
    if room is not out:
        out.copy_(room)


def prepare(problem: AttentionProblem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Run:
    """`run` of this problem for tensors like these: all but their addresses is settled once."""
    anew = partial(run, problem)
    if not all(readable(x) for x in (q, k, v)):
        return anew
    out_strides, lse_strides = map(contiguous_strides, (q.shape, problem.lse_shape(q.shape[0])))
    launch, held = _packed(problem, q, k, v, out_strides, lse_strides, _chosen(problem, q))
    if held:  # copies of what the caller may rewrite
        return anew
    run_launch = launch.run

    def call(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor | None
    ) -> None:
        try:
            run_launch(q, k, v, out, lse)
        except OffSixteenBytes:
            anew(q, k, v, out, lse)

    return call


def _packed(
    problem: AttentionProblem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out_strides: tuple[int, ...],
    lse_strides: tuple[int, ...],
    tile: Tile,
) -> tuple[Launch, list[torch.Tensor]]:
    """The launch, and copies that it reads of the problem's own tensors: to live until it is queued."""
    device = q.get_device()
    params = Params.of(problem, tile.queries, _section(problem))
    params.lay_out(out_strides, lse_strides)
    held = params.attach(problem)
    tiles = params.q_tiles * params.heads
    launch = Launch(
        jit.kernel(_SOURCE, "attend", defines(problem, tile), device),
        params,
        _maps(problem, q, k, v, out_strides, tile),
        grid=tiles if tile.folded else min(tiles, gpu(device).sm_count),
        block=tile.threads,
        shared_bytes=tile.shared_bytes(problem.head_dim),
        programmatic=True,
    )
    return launch, held


def _maps(
    problem: AttentionProblem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out_strides: tuple[int, ...],
    tile: Tile,
) -> tuple[Maps, ...]:
    queries = Maps(q.dtype, q.shape, q.stride(), ROWS)
    maps: tuple[Maps, ...] = (queries, queries, queries)
    if k.numel():
        box = min(tile.keys, problem.page_size or tile.keys)
        keys = Maps(k.dtype, k.shape, k.stride(), box, whole=box == tile.keys)
        values = Maps(v.dtype, v.shape, v.stride(), box, whole=box == tile.keys or box % 16 == 0)
        maps = (queries, keys, values)
    if tile.bulk_store:
        return (*maps, Maps(q.dtype, q.shape, out_strides, ROWS))
    return maps


def defines(problem: AttentionProblem, tile: Tile) -> dict[str, jit.Define]:
    """What the kernel is compiled for: the features that this problem uses, and no other."""
    left, right = problem.window
    return {
        "scalar_t": jit.SCALAR[problem.dtype],
        "HEAD_DIM": problem.head_dim,
        "K_TILE": tile.keys,
        "CONSUMERS": tile.consumers,
        "Q_STAGES": tile.q_stages,
        "HAS_LEFT": left != UNLIMITED,
        "HAS_RIGHT": right != UNLIMITED,
        "KEYLESS": _keyless(problem),
        "SOFTCAP": problem.softcap > 0,
        "SINKS": problem.sinks is not None,
        "PACKED_Q": problem.packed_q,
        "PACKED_KV": isinstance(problem.layout, Packed),
        "PAGE_SIZE": problem.page_size,
        "BULK_STORE": tile.bulk_store,
        "FOLDED": tile.folded,
    }


def sources(arch: str) -> list[jit.Source]:
    """Self-attention in bfloat16, causal and not, at each head_dim and tile."""
    if arch != "sm_90a":
        return []
    tiles = [(head_dim, causal, tile) for head_dim, tile in TILES.items() for causal in (False, True)]
    tiles += [(head_dim, True, replace(tile, folded=True)) for head_dim, tile in TILES.items()]
    tiles += [(64, False, _THREE), (64, True, _THREE), (128, False, _BULK), (128, True, _BULK)]
    return [
        jit.Source(_SOURCE, defines(AttentionProblem(1, 1, 1, 1, 1, head_dim, causal=causal), tile))
        for head_dim, causal, tile in tiles
    ]


def _keyless(problem: AttentionProblem) -> bool:
    """Whether some tile of queries may see no key; where lengths are the device's, any may."""
    right = problem.window[1]
    if not isinstance(problem.layout, Dense):
        return True
    return not problem.kv_len or (right != UNLIMITED and problem.q_len > problem.kv_len + right)


def _folds(problem: AttentionProblem) -> bool:
    """Whether a row's queries see keys from 0 on, the later the more."""
    left, right = problem.window
    causal = left == UNLIMITED and right != UNLIMITED
    return causal and isinstance(problem.layout, Dense) and not _keyless(problem)


def _chosen(problem: AttentionProblem, q: torch.Tensor) -> Tile:
    return choose_tile(problem, gpu(q.get_device()).sm_count)


def _section(problem: AttentionProblem) -> int:
    """Query heads whose tiles are mixed, longest first, as many in each section.

    Their keys and values fit in L2. Where rows are short, memory is what limits: with fewer heads at a time
    it is read all along.
    """
    if not problem.masked:
        return problem.group
    short = problem.kv_len <= 1024 and problem.head_dim <= 128
    room = (8 << 20 if short else 32 << 20) // (4 * problem.head_dim * max(1, problem.kv_len))
    key_heads = problem.batch * problem.kv_heads
    sections = -(-key_heads // max(1, room))
    return problem.group * -(-key_heads // sections)
