"""FlashAttention-2 on mma.sync with cp.async: the portable production rung, for sm_80 and up.

Source: Dao 2023 (arXiv 2307.08691); the kernel and its ideas are in cuda_async.cu.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from threading import Lock

import torch

from strobe.attention import dense
from strobe.attention.plan import Run, contiguous_strides
from strobe.attention.problem import UNLIMITED, AttentionProblem, Packed, Paged
from strobe.cuda import jit, needs
from strobe.device import gpu

IDEA = "copies run beside the products, masked tiles apart, sums rescaled only when a maximum outgrows them"

_SOURCE = Path(__file__).with_suffix(".cu")


@dataclass(frozen=True)
class Tile:
    """How a block works: query rows (tokens x heads of a group) and keys at a time, and by how many warps.

    `blocks_per_sm` is what the compiler leaves registers for; `stages` pairs of K and V tiles are in
    shared memory at once.
    """

    q: int = 128
    k: int = 64
    warps: int = 4
    blocks_per_sm: int = 1
    q_in_registers: bool = False
    stages: int = 2

    def shared_bytes(self, head_dim: int) -> int:
        """Q and the stages, 16 bits an element."""
        return 2 * head_dim * (self.q + 2 * self.stages * self.k)

    def accumulators(self, head_dim: int) -> int:
        """Registers a thread takes for its share of the output and the scores."""
        return self.q // self.warps * (head_dim + self.k) // 32


TILES = {
    64: (Tile(128, 64, 4, 2, q_in_registers=True),),
    96: (Tile(128, 48, 4, 2), Tile(128, 64, 8, 1)),
    112: (Tile(128, 32, 4, 2), Tile(128, 48, 8, 1)),
    128: (Tile(128, 64, 4, 2), Tile(128, 32, 4, 2), Tile(128, 64, 8, 1, q_in_registers=True)),
    256: (Tile(128, 64, 8, 1), Tile(64, 32, 4, 1)),
}
"""By the largest head_dim served, best first; the first whose blocks fit an SM's shared memory is used.

Measured on an H200 at 64, 128 and 256 (docs/log.md): 32 query rows a warp, so that what ldmatrix
reads serves two products. At 16 rows shared memory is the limit, and at 48 or more the registers.
"""


class _Strides(ctypes.Structure):
    _fields_ = [(name, ctypes.c_longlong) for name in ("batch", "row", "head")]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Strides:
        """Of `[batch or page, row, head, dim]`, or packed `[row, head, dim]`."""
        return cls(*((0,) * (4 - tensor.dim())), *tensor.stride()[:-1])


class _Params(ctypes.Structure):
    """`Params` of cuda_async.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "out", "lse", "sinks")),
        *((name, ctypes.c_void_p) for name in ("cu_seqlens_q", "cu_seqlens_kv", "seq_lens", "page_table")),
        *((name, _Strides) for name in ("q_strides", "k_strides", "v_strides", "out_strides")),
        *((name, ctypes.c_longlong) for name in ("lse_batch_stride", "lse_head_stride")),
        *((name, ctypes.c_int) for name in ("q_len", "kv_len", "kv_heads", "pages_per_row")),
        *((name, ctypes.c_int) for name in ("q_tiles", "sequences", "section", "left", "right")),
        *((name, ctypes.c_float) for name in ("scale_log2", "softcap_scale")),
    ]


def refusals(problem: AttentionProblem) -> list[str]:
    reasons = needs.refusals(problem.device, problem.arch)
    if problem.dtype not in ("float16", "bfloat16"):
        reasons.append(f"dtype {problem.dtype}; supported: float16, bfloat16")
    elif problem.kv_dtype != problem.dtype:
        reasons.append(f"k and v in {problem.kv_dtype}; supported: q's dtype")
    if problem.head_dim % 16 or not 32 <= problem.head_dim <= 256:
        reasons.append(f"head_dim {problem.head_dim}; supported: multiples of 16 from 32 to 256")
    if not problem.scale or problem.scale < 0:
        reasons.append(f"scale {problem.scale}; supported: above 0")
    return reasons


def refusals_for_tile(problem: AttentionProblem, tile: Tile) -> list[str]:
    reasons = []
    fitting = _fitting(tile, problem.head_dim, problem.arch)
    if tile.warps < 1 or tile.q % (16 * tile.warps) or tile.q < 1:
        reasons.append(f"tile q={tile.q}; supported: multiples of 16 for each of its {tile.warps} warps")
    elif tile.k % 16 or tile.k < 1:
        reasons.append(f"tile k={tile.k}; supported: multiples of 16")
    elif tile.stages < 2:
        reasons.append(f"tile stages={tile.stages}; supported: 2 and up")
    elif tile.q_in_registers not in (0, 1):
        reasons.append(f"tile q_in_registers={tile.q_in_registers}; supported: 0, 1")
    elif not 1 <= tile.blocks_per_sm <= max(1, fitting):
        reasons.append(
            f"tile blocks_per_sm={tile.blocks_per_sm}; supported: 1 to {max(1, fitting)} of this size"
        )
    elif (taken := tile.accumulators(problem.head_dim)) > 192:
        reasons.append(f"its accumulators take {taken} registers a thread; supported: up to 192")
    footprint = dense.Footprint(32 * tile.warps, tile.shared_bytes(problem.head_dim) + _STATIC_BYTES)
    return reasons or dense.refusals_of(footprint, problem)


def run(
    problem: AttentionProblem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    tile: Tile | None = None,
) -> None:
    q, k, v, room = map(dense.aligned, (q, k, v, out))
    sinks = _float_sinks(problem)
    launch = _packed(problem, tile, (q, k, v, room), sinks, (0, 0) if lse is None else lse.stride())
    _point(launch.args[0], q, k, v, room, lse)
    launch()
    if room is not out:
        out.copy_(room)


def prepare(problem: AttentionProblem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Run:
    """`run` of this problem for tensors like these: all but their addresses is packed once."""
    anew, sinks = partial(run, problem), _float_sinks(problem)
    if sinks is not problem.sinks or any(dense.aligned(x) is not x for x in (q, k, v)):
        return anew
    out = torch.empty(q.shape, dtype=q.dtype, device="meta")
    lse_strides = contiguous_strides(problem.lse_shape(q.shape[0]))
    launch, lock = _packed(problem, None, (q, k, v, out), sinks, lse_strides), Lock()
    params = launch.args[0]

    def call(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor | None
    ) -> None:
        if (q.data_ptr() | k.data_ptr() | v.data_ptr() | out.data_ptr()) % 16:
            anew(q, k, v, out, lse)
            return
        with lock:
            _point(params, q, k, v, out, lse)
            launch()

    return call


def _float_sinks(problem: AttentionProblem) -> torch.Tensor | None:
    return None if problem.sinks is None else problem.sinks.float().contiguous()


def _point(params: _Params, *tensors: torch.Tensor | None) -> None:
    """Take the addresses of q, k, v, out and lse."""
    for name, tensor in zip(("q", "k", "v", "out", "lse"), tensors, strict=True):
        setattr(params, name, None if tensor is None else tensor.data_ptr())


def _packed(
    problem: AttentionProblem,
    tile: Tile | None,
    like: tuple[torch.Tensor, ...],
    sinks: torch.Tensor | None,
    lse_strides: tuple[int, ...],
) -> jit.Launch:
    """The launch for q, k, v and out like these, but for their addresses and lse's."""
    tile, device = tile or choose_tile(problem.head_dim, problem.arch), like[0].get_device()
    params = _params(problem, tile, like, sinks, lse_strides)
    return jit.kernel(_SOURCE, "attend", defines(problem, tile), device).prepare(
        params.q_tiles * params.sequences,
        32 * tile.warps,
        params,
        shared_bytes=tile.shared_bytes(problem.head_dim),
    )


_RESERVED_BYTES = 1024
"""Shared memory that the driver keeps for each block."""
_STATIC_BYTES = 256
"""Room for the kernel's `Block`."""


@cache
def choose_tile(head_dim: int, arch: int) -> Tile:
    """The first tile of TILES whose blocks fit an SM's shared memory together."""
    candidates = next(tiles for largest, tiles in TILES.items() if head_dim <= largest)
    fitting = (tile for tile in candidates if tile.blocks_per_sm <= _fitting(tile, head_dim, arch))
    return next(fitting, candidates[-1])


def _fitting(tile: Tile, head_dim: int, arch: int) -> int:
    """Blocks that fit an SM's shared memory together."""
    room = dense.shared_memory(arch) + _RESERVED_BYTES
    return room // (tile.shared_bytes(head_dim) + _STATIC_BYTES + _RESERVED_BYTES)


def defines(problem: AttentionProblem, tile: Tile) -> dict[str, jit.Define]:
    """What the kernel is compiled for: the features that this problem uses, and no other."""
    left, right = problem.window
    return {
        "scalar_t": jit.SCALAR[problem.dtype],
        "HEAD_DIM": problem.head_dim,
        "GROUP": problem.group,
        "PAGE_SIZE": problem.page_size,
        "PACKED_Q": problem.packed_q,
        "PACKED_KV": isinstance(problem.layout, Packed),
        "HAS_LEFT": left != UNLIMITED,
        "HAS_RIGHT": right != UNLIMITED,
        "SOFTCAP": problem.softcap > 0,
        "SINKS": problem.sinks is not None,
        "Q_TILE": tile.q,
        "K_TILE": tile.k,
        "WARPS": tile.warps,
        "STAGES": tile.stages,
        "Q_IN_REGISTERS": tile.q_in_registers,
        "BLOCKS_PER_SM": tile.blocks_per_sm,
    }


def sources(arch: str) -> list[jit.Source]:
    """Each size of tiles, each dtype and each policy once."""
    number = jit.arch_number(arch)
    pages = Paged(page_table=None, seq_lens=None, cu_seqlens_q=())
    problems = [
        AttentionProblem(1, 1, 1, 1, 1, 64, causal=True),
        AttentionProblem(1, 1, 1, 1, 1, 128),
        AttentionProblem(1, 1, 1, 1, 1, 128, dtype="float16", causal=True),
        AttentionProblem(1, 1, 1, 1, 1, 256, causal=True),
        AttentionProblem(1, 1, 1, 4, 1, 64, causal=True, layout=pages, page_size=16),
        AttentionProblem(1, 1, 1, 4, 1, 128, causal=True, layout=pages, page_size=16),
        AttentionProblem(1, 1, 1, 2, 1, 96, window=(64, 0), softcap=30.0, sinks=(), layout=Packed((), ())),
    ]
    return [jit.Source(_SOURCE, defines(p, choose_tile(p.head_dim, number))) for p in problems]


def _params(
    problem: AttentionProblem,
    tile: Tile,
    like: tuple[torch.Tensor, ...],
    sinks: torch.Tensor | None,
    lse_strides: tuple[int, ...],
) -> _Params:
    """Addresses of q, k, v, out and lse are to come."""
    layout, k = problem.layout, like[1]
    sequences = problem.batch * problem.kv_heads
    sequence_bytes = 2 * k.element_size() * max(1, problem.kv_len) * problem.head_dim
    left, right = problem.bounds
    params = _Params(
        **{f"{name}_strides": _Strides.of(x) for name, x in zip(("q", "k", "v", "out"), like, strict=True)},
        lse_batch_stride=0 if problem.packed_q else lse_strides[0],
        lse_head_stride=lse_strides[-2],
        q_len=problem.q_len,
        kv_len=problem.kv_len,
        kv_heads=problem.kv_heads,
        q_tiles=-(-problem.q_len * problem.group // tile.q),
        sequences=sequences,
        section=min(sequences, max(1, gpu(k.get_device()).l2_cache // 4 // sequence_bytes)),
        left=left,
        right=right,
        scale_log2=(problem.softcap or problem.scale) * math.log2(math.e),
        softcap_scale=problem.scale / problem.softcap if problem.softcap else 0.0,
    )
    if sinks is not None:
        params.sinks = sinks.data_ptr()
    if isinstance(layout, (Packed, Paged)) and layout.cu_seqlens_q is not None:
        params.cu_seqlens_q = layout.cu_seqlens_q.data_ptr()
    if isinstance(layout, Packed):
        params.cu_seqlens_kv = layout.cu_seqlens_kv.data_ptr()
    if isinstance(layout, Paged):
        params.seq_lens, params.page_table = layout.seq_lens.data_ptr(), layout.page_table.data_ptr()
        params.pages_per_row = layout.page_table.stride(0)
    return params
