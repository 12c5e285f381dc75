"""FlashAttention for Hopper's own units: bulk copies, warpgroup products, warps with a role each.

Sources: Dao 2023 (arXiv 2307.08691); Shah et al. 2024, FlashAttention-3 (arXiv 2407.08608) for producer
and consumers, turns, and the overlap of products and softmax. What is our own is in cuda_hopper.cu.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import torch

from strobe.attention import dense
from strobe.attention.problem import UNLIMITED, AttentionProblem, Dense, Packed, Paged
from strobe.cuda import jit

IDEA = (
    "one warp copies in bulk; warpgroups take turns at the tensor cores, softmax under the other's products"
)

HEAD_DIMS = (64, 96, 128, 192, 256)
_SOURCE = Path(__file__).with_suffix(".cu")
_FAR = 1 << 30
_LOG2E = math.log2(math.e)
_ROWS = 64
_STAGES = 2
_BARRIERS_BYTES = 2048
_SECTION_BYTES = 32 << 20
"""Keys and values whose heads are worked on together: over half of an H200's L2."""


@dataclass(frozen=True)
class Tiling:
    """How a block works: `consumers` warpgroups of 64 queries, `keys` at a time, `q_stages` tiles of q."""

    consumers: int
    keys: int
    q_stages: int

    @property
    def queries(self) -> int:
        return _ROWS * self.consumers

    @property
    def threads(self) -> int:
        return 128 * (self.consumers + 1)

    def shared_bytes(self, head_dim: int) -> int:
        """q, the stages of keys and values, the barriers."""
        rows = self.q_stages * self.queries + 2 * _STAGES * self.keys
        return 2 * head_dim * rows + _BARRIERS_BYTES


TILINGS = {
    64: Tiling(2, 128, 2),
    96: Tiling(2, 128, 2),
    128: Tiling(2, 128, 2),
    192: Tiling(2, 64, 1),
    256: Tiling(2, 64, 1),
}
_THREE = Tiling(3, 128, 2)


def choose_tiling(problem: AttentionProblem) -> Tiling:
    """Measured on an H200 (docs/log.md).

    At head_dim 64 the special-function unit limits, and a third consumer keeps it busier; it has no
    registers to spare for anything but plain problems, and is too coarse for short causal ones.
    """
    plain = isinstance(problem.layout, Dense) and not problem.softcap and problem.sinks is None
    if problem.head_dim == 64 and plain:
        if not problem.masked and problem.q_len > 2 * _THREE.queries:
            return _THREE
        if problem.window == (UNLIMITED, 0) and problem.q_len >= 2048:
            return _THREE
    return TILINGS[problem.head_dim]


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
        keys = TILINGS[problem.head_dim].keys
        if problem.page_size % 8 or (keys % problem.page_size and problem.page_size % keys):
            sizes = ", ".join(str(n) for n in (8, 16, 32, 64) if n < keys)
            reasons.append(f"page_size {problem.page_size}; supported: {sizes} and multiples of {keys}")
    if problem.bias is not None:
        reasons.append("a bias; supported: none")
    if not problem.scale or problem.scale < 0:
        reasons.append(f"scale {problem.scale}; supported: above 0")
    return reasons


class _Params(ctypes.Structure):
    """`Params` of cuda_hopper.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("out", "lse", "sinks", "cu_seqlens_q", "cu_seqlens_kv")),
        *((name, ctypes.c_void_p) for name in ("seq_lens", "page_table", "next_tile")),
        *((f"out_{name}_stride", ctypes.c_longlong) for name in ("batch", "row", "head")),
        *((f"lse_{name}_stride", ctypes.c_longlong) for name in ("batch", "head")),
        *((name, ctypes.c_int) for name in ("q_tiles", "heads", "section")),
        *((name, ctypes.c_int) for name in ("q_heads", "group", "q_len", "kv_len", "pages_per_row")),
        *((name, ctypes.c_int) for name in ("left", "right", "zero")),
        *((name, ctypes.c_float) for name in ("scale_log2", "softcap_scale")),
    ]


def run(
    problem: AttentionProblem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    tiling: Tiling | None = None,
) -> None:
    tiling = tiling or choose_tiling(problem)
    device = q.get_device()
    attend = jit.kernel(_SOURCE, "attend", defines(problem, tiling), device)
    box = min(tiling.keys, problem.page_size or tiling.keys)
    q, q_map = _mapped(q, _ROWS, True)
    k, k_map = _mapped(k, box, not problem.paged) if k.numel() else (k, q_map)
    v, v_map = _mapped(v, box, not problem.paged) if v.numel() else (v, q_map)
    room = dense.aligned(out)
    sinks = None if problem.sinks is None else problem.sinks.float().contiguous()
    params = _params(problem, tiling, room, lse, sinks)
    attend(
        grid=min(params.q_tiles * params.heads, _multiprocessors(device)),
        block=tiling.threads,
        args=[q_map, k_map, v_map, params],
        shared_bytes=tiling.shared_bytes(problem.head_dim),
    )
    if room is not out:
        out.copy_(room)


def defines(problem: AttentionProblem, tiling: Tiling) -> dict[str, jit.Define]:
    """What the kernel is compiled for: the features that this problem uses, and no other."""
    left, right = problem.window
    return {
        "scalar_t": dense.SCALAR[problem.dtype],
        "HEAD_DIM": problem.head_dim,
        "K_TILE": tiling.keys,
        "CONSUMERS": tiling.consumers,
        "Q_STAGES": tiling.q_stages,
        "HAS_LEFT": left != UNLIMITED,
        "HAS_RIGHT": right != UNLIMITED,
        "SOFTCAP": problem.softcap > 0,
        "SINKS": problem.sinks is not None,
        "PACKED_Q": problem.packed_q,
        "PACKED_KV": isinstance(problem.layout, Packed),
        "PAGE_SIZE": problem.page_size,
    }


def sources(arch: str) -> list[jit.Source]:
    """Self-attention in bfloat16, causal and not, at each head_dim and tiling."""
    if arch != "sm_90a":
        return []
    return [
        jit.Source(_SOURCE, defines(problem, tiling))
        for head_dim in HEAD_DIMS
        for causal in (False, True)
        for problem in [AttentionProblem(1, 1, 1, 1, 1, head_dim, causal=causal)]
        for tiling in (TILINGS[head_dim], *([_THREE] if head_dim == 64 else []))
    ]


def _params(
    problem: AttentionProblem,
    tiling: Tiling,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> _Params:
    layout = problem.layout
    scale = problem.scale or 0.0
    left, right = (_FAR if side == UNLIMITED else min(side, _FAR) for side in problem.window)
    params = _Params(
        out=out.data_ptr(),
        next_tile=_next_tile(out.get_device()),
        q_tiles=-(-problem.q_len // tiling.queries),
        heads=problem.batch * problem.q_heads,
        section=_section(problem),
        q_heads=problem.q_heads,
        group=problem.group,
        q_len=problem.q_len,
        kv_len=problem.kv_len,
        left=left,
        right=right,
        scale_log2=(problem.softcap or scale) * _LOG2E,
        softcap_scale=scale / problem.softcap if problem.softcap else 0.0,
    )
    *batch_stride, params.out_row_stride, params.out_head_stride, _ = out.stride()
    params.out_batch_stride = sum(batch_stride)  # none where q is packed
    if lse is not None:
        params.lse = lse.data_ptr()
        *batch_stride, params.lse_head_stride, _ = lse.stride()
        params.lse_batch_stride = sum(batch_stride)
    if sinks is not None:
        params.sinks = sinks.data_ptr()
    if isinstance(layout, Packed):
        params.cu_seqlens_q = _entries(layout.cu_seqlens_q).data_ptr()
        params.cu_seqlens_kv = _entries(layout.cu_seqlens_kv).data_ptr()
    elif isinstance(layout, Paged):
        table = _entries(layout.page_table)
        params.page_table, params.pages_per_row = table.data_ptr(), table.stride(0)
        params.seq_lens = _entries(layout.seq_lens).data_ptr()
        if layout.cu_seqlens_q is not None:
            params.cu_seqlens_q = _entries(layout.cu_seqlens_q).data_ptr()
    return params


def _entries(indices: torch.Tensor) -> torch.Tensor:
    """With a row's entries side by side. A copy is freed in stream order, so after the launch."""
    return indices if indices.stride(-1) == 1 else indices.contiguous()


def _section(problem: AttentionProblem) -> int:
    """Query heads whose tiles are mixed, longest first: as many as fit L2, where tiles differ in length."""
    if not problem.masked:
        return problem.group
    key_heads = _SECTION_BYTES // (4 * problem.head_dim * max(1, problem.kv_len))
    return min(problem.batch * problem.q_heads, problem.group * max(1, key_heads))


def _mapped(tensor: torch.Tensor, rows: int, whole: bool) -> tuple[torch.Tensor, jit.TensorMap]:
    """The tensor and its map, or where the copy engine cannot read it, a copy's."""
    while (
        found := _tensor_map(tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), rows, whole)
    ) is None:
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    return tensor, found


@lru_cache(maxsize=4096)
def _tensor_map(
    pointer: int, dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...], rows: int, whole: bool
) -> jit.TensorMap | None:
    """Boxes of `rows` rows of one head of `[batch or page, row, head, dim]` or packed `[row, head, dim]`:
    `whole` rows, as panels of 64 columns (32 where 64 does not divide head_dim) one after the other, or
    one panel. A row of a panel is what the copy engine swizzles.

    None where the engine cannot read the tensor: rows off 16 bytes, or a dimension expanded.
    """
    head_dim = shape[-1]
    panel = 32 if head_dim % 64 else 64
    batch, length, heads, _ = (1,) * (4 - len(shape)) + tuple(shape)
    batch_stride, row_stride, head_stride, _ = (0,) * (4 - len(shape)) + tuple(strides)
    sizes = (panel, length, head_dim // panel, heads, batch)
    elements_apart = (row_stride, panel, head_stride, batch_stride)
    # The driver checks the stride even of a dimension of one element.
    apart = [2 * n if size > 1 else 16 for size, n in zip(sizes[1:], elements_apart, strict=True)]
    if pointer % 16 or any(n % 16 or n == 0 for n in apart):
        return None
    box = (panel, rows, head_dim // panel if whole else 1, 1, 1)
    name = str(dtype).removeprefix("torch.")
    return jit.tensor_map(pointer, name, sizes, tuple(apart), box, swizzle=2 * panel)


_counters: dict[tuple[int, int], torch.Tensor] = {}


def _next_tile(device: int) -> int:
    """Address of a zeroed int32 from which a launch draws its tiles; the launch leaves it zeroed.

    Launches of one stream share theirs, since they follow one another. A captured launch may be
    replayed beside any stream, so it has its own, zeroed in the graph.
    """
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device).data_ptr()
    key = device, torch.cuda.current_stream(device).cuda_stream
    counter = _counters.get(key)
    if counter is None:
        counter = _counters[key] = torch.zeros(1, dtype=torch.int32, device=device)
    return counter.data_ptr()


@cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
