"""What an attention call asks for: shapes, dtype, mask and KV layout, checked once.

This module imports no torch: a problem can be described, explained and costed on any machine.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, NamedTuple

import numpy as np

from strobe.errors import ProblemError

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}
UNLIMITED = -1
WIDEST = 1 << 30
"""The widest window: kernels add it to a position in 32 bits."""
LARGEST = (1 << 31) - 1
"""The largest size: kernels count in 32 bits."""
_LEAST = {"batch": 0, "q_len": 0, "kv_len": 0, "q_heads": 1, "kv_heads": 1, "head_dim": 1}
DECODE_MAX_Q_LEN = 16
"""Up to this many queries a row, a problem belongs to the decode ladder, unless its keys are packed."""


@dataclass(frozen=True, eq=False)
class Dense:
    """q `[batch, q_len, q_heads, head_dim]`, k and v `[batch, kv_len, kv_heads, head_dim]`."""


@dataclass(frozen=True, eq=False)
class Packed:
    """Rows of different lengths laid end to end: q `[tokens, q_heads, head_dim]`, k and v likewise.

    `cu_seqlens_q` and `cu_seqlens_kv` are int32 `[batch + 1]` running sums on the tensors' device.
    The maximum lengths are host integers; where they are left out they are read off the device, once,
    which waits for it: what is written to the sums later may not pass them. Tokens past the last sum are
    neither read nor written. `scratch` is as in `Paged`.
    """

    cu_seqlens_q: Any
    cu_seqlens_kv: Any
    max_q_len: int | None = None
    max_kv_len: int | None = None
    scratch: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def written(self) -> tuple[int, ...]:
        """How often each of its tensors was written to in place; 0 where nobody counts (inference mode)."""
        return _version(self.cu_seqlens_q), _version(self.cu_seqlens_kv)

    @property
    def host_q(self) -> list[int]:
        """`cu_seqlens_q` on the host (waits for the device where it was written to)."""
        return _on_host(self, "cu_seqlens_q")

    @property
    def host_kv(self) -> list[int]:
        """`cu_seqlens_kv` on the host (waits for the device where it was written to)."""
        return _on_host(self, "cu_seqlens_kv")


@dataclass(frozen=True, eq=False)
class Paged:
    """k and v in pages `[pages, page_size, kv_heads, head_dim]`.

    `page_table` int32 `[batch, max_pages]`; `seq_lens` int32 `[batch]` counts a row's keys, those of
    this call's queries included. q is `[batch, q_len, q_heads, head_dim]`, or with `cu_seqlens_q`
    (int32 `[batch + 1]`) packed `[tokens, q_heads, head_dim]`. Page numbers past a row's length may be
    anything.

    A float8 cache holds `key / k_scale` and `value / v_scale`: float32 `[kv_heads]`, both or neither.

    `settled` promises that the kernel just ahead in the stream writes none of `page_table`, `seq_lens`,
    `cu_seqlens_q` and the keys and values older than this call's queries: they may be read before it has
    ended. Where that kernel is a settled attention itself, the one ahead of it writes none of them either.

    `scratch` belongs to the rungs: what one derives from the layout (host lengths, gather indices,
    split plans) is kept here under the rung's name, so that all layers of a forward pass share it.
    """

    page_table: Any
    seq_lens: Any
    cu_seqlens_q: Any = None
    max_q_len: int | None = None
    max_kv_len: int | None = None
    k_scale: Any = None
    v_scale: Any = None
    settled: bool = False
    scratch: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def written(self) -> tuple[int, ...]:
        """How often each of its tensors was written to in place; 0 where nobody counts (inference mode)."""
        return _version(self.page_table), _version(self.seq_lens), _version(self.cu_seqlens_q)

    @property
    def host_q(self) -> list[int] | None:
        """`cu_seqlens_q` on the host (waits for the device where it was written to), None without one."""
        return None if self.cu_seqlens_q is None else _on_host(self, "cu_seqlens_q")

    @property
    def host_lens(self) -> list[int]:
        """`seq_lens` on the host (waits for the device where it was written to)."""
        return _on_host(self, "seq_lens")


Layout = Dense | Packed | Paged


def _version(tensor: Any) -> int:
    counted = tensor is not None and hasattr(tensor, "is_inference") and not tensor.is_inference()
    return tensor._version if counted else 0


def _on_host(layout: Packed | Paged, name: str) -> list[int]:
    """A tensor of the layout as integers, read again where it was written to since."""
    tensor = getattr(layout, name)
    kept, version = layout.scratch.get(("on the host", name)), _version(tensor)
    if kept is None or kept[0] != version:
        kept = layout.scratch["on the host", name] = version, [int(n) for n in tensor.tolist()]
    return kept[1]


class Options(NamedTuple):
    """attention()'s keywords, as it takes them."""

    causal: bool = False
    window: tuple[int, int] = (UNLIMITED, UNLIMITED)
    scale: Any = None
    softcap: float = 0.0
    sinks: Any = None
    bias: Any = None
    layout: Layout | None = None
    return_lse: bool = False


def _sum(start: int, count: int, top: int) -> int:
    """`start + (start + 1) + ...`, `count` terms, each taken to the nearest of 0 to `top`."""
    first, end = max(start, 0), min(start + count, top)
    ramp = (first + end - 1) * (end - first) // 2 if end > first else 0
    return ramp + top * min(count, max(0, start + count - top))


def _is_window(window: object) -> bool:
    return (
        isinstance(window, tuple)
        and len(window) == 2
        and all(isinstance(side, (int, np.integer)) and UNLIMITED <= side <= WIDEST for side in window)
    )


@dataclass(frozen=True, eq=False)
class AttentionProblem:
    """One attention call, without its data. `attention.inputs.describe` builds it from tensors.

    `q_len` and `kv_len` are the longest row's. `window` is `(left, right)`, inclusive, -1 for no
    limit. Query i of a row sees key j when `j <= i + kv_len - q_len + right` and
    `j >= i + kv_len - q_len - left`; `causal` sets right to 0. Scores are `q·k * scale`, then
    `softcap * tanh(score / softcap)` where softcap > 0, plus `bias` where there is one, then the
    mask, then a softmax whose sum starts at `exp(sink[head])` where there are sinks. `bias`
    broadcasts to `[batch, q_heads, q_len, kv_len]`; -inf in it hides a key. Dense layouts only.
    """

    batch: int
    q_len: int
    kv_len: int
    q_heads: int
    kv_heads: int
    head_dim: int
    dtype: str = "bfloat16"
    causal: bool = False
    window: tuple[int, int] = (UNLIMITED, UNLIMITED)
    scale: Any = None
    """float; None becomes `head_dim ** -0.5`."""
    softcap: float = 0.0
    sinks: Any = None
    bias: Any = None
    layout: Layout = Dense()
    page_size: int = 0
    kv_dtype: str | None = None
    device: str = "cpu"
    arch: int = 0
    """Compute capability times ten (90 for an H100 or H200), 0 without a GPU."""
    return_lse: bool = False

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            if not least <= getattr(self, name) <= LARGEST:
                raise ProblemError(f"{name} is {getattr(self, name)}; supported: {least} to {LARGEST}")
        if self.q_heads % self.kv_heads:
            raise ProblemError(
                f"q_heads {self.q_heads} is not a multiple of kv_heads {self.kv_heads}",
                hint="each key head serves a whole group of query heads",
            )
        if self.dtype not in DTYPE_BYTES:
            raise ProblemError(f"dtype {self.dtype}; supported: {', '.join(DTYPE_BYTES)}")
        if not isinstance(self.causal, bool):
            raise ProblemError(f"causal is {self.causal!r:.60}; supported: True, False")
        if not _is_window(self.window):
            raise ProblemError(
                f"window {self.window!r:.60}; supported: (left, right), integers from -1 to {WIDEST}"
            )
        if not isinstance(self.softcap, Real) or not 0 <= self.softcap < math.inf:
            raise ProblemError(f"softcap {self.softcap!r:.60}; supported: 0 (none) or a positive number")
        if self.scale is None:
            object.__setattr__(self, "scale", self.head_dim**-0.5)
        if not isinstance(self.scale, Real) or not math.isfinite(self.scale):
            raise ProblemError(
                f"scale {self.scale!r:.60}; supported: a finite number, None for head_dim ** -0.5"
            )
        if self.bias is not None and not isinstance(self.layout, Dense):
            raise ProblemError(f"a bias with layout {type(self.layout).__name__}; supported: Dense")
        if self.causal:
            left, right = self.window
            object.__setattr__(self, "window", (left, 0 if right == UNLIMITED else min(right, 0)))
        if self.kv_dtype is None:
            object.__setattr__(self, "kv_dtype", self.dtype)

    @property
    def group(self) -> int:
        """Query heads that share one key head."""
        return self.q_heads // self.kv_heads

    @property
    def paged(self) -> bool:
        return isinstance(self.layout, Paged)

    @property
    def packed_q(self) -> bool:
        """True where q, out and lse are packed: `[tokens, heads, dim]` and lse `[heads, tokens]`."""
        return isinstance(self.layout, Packed) or (
            isinstance(self.layout, Paged) and self.layout.cu_seqlens_q is not None
        )

    def lse_shape(self, tokens: int) -> tuple[int, ...]:
        """Of the log-sum-exp: `[q_heads, tokens]` where q is packed, else `[batch, q_heads, q_len]`."""
        return (self.q_heads, tokens) if self.packed_q else (self.batch, self.q_heads, self.q_len)

    @property
    def masked(self) -> bool:
        """True where some query may not see some key of its row."""
        return self.window != (UNLIMITED, UNLIMITED)

    @property
    def bounds(self) -> tuple[int, int]:
        """`window` as kernels add it to a position: WIDEST where it has no limit."""
        left, right = (WIDEST if side == UNLIMITED else side for side in self.window)
        return left, right

    @property
    def phase(self) -> str:
        """The ladder this problem belongs to: "decode" (few queries a row) or "prefill"."""
        packed = isinstance(self.layout, Packed)
        return "decode" if self.q_len <= DECODE_MAX_Q_LEN and not packed else "prefill"

    def row_lengths(self) -> list[tuple[int, int]]:
        """`(q_len, kv_len)` of every row. Reads the lengths off the device where they live there."""
        layout = self.layout
        if isinstance(layout, Packed):
            q, kv = layout.host_q, layout.host_kv
            return [(q[i + 1] - q[i], kv[i + 1] - kv[i]) for i in range(self.batch)]
        if isinstance(layout, Paged):
            host_q = layout.host_q
            return [
                (self.q_len if host_q is None else host_q[i + 1] - host_q[i], layout.host_lens[i])
                for i in range(self.batch)
            ]
        return [(self.q_len, self.kv_len)] * self.batch

    def _row_counts(self) -> Counter[tuple[int, int]]:
        """How many rows have each `(q_len, kv_len)`."""
        if isinstance(self.layout, Dense):
            return Counter({(self.q_len, self.kv_len): self.batch})
        return Counter(self.row_lengths())

    def key_range(self, q_len: int, kv_len: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys `[first, end)` that each query of such a row sees, int64 `[q_len]` both; end may be below."""
        left, right = self.window
        position = np.arange(q_len, dtype=np.int64) + (kv_len - q_len)
        first = np.zeros(q_len, np.int64) if left == UNLIMITED else np.maximum(0, position - left)
        end = np.full(q_len, kv_len) if right == UNLIMITED else np.minimum(kv_len, position + right + 1)
        return first, end

    def visible_pairs(self) -> int:
        """(query, key) pairs that the mask lets through, over all rows, for one head."""
        left, right = self.window
        total = 0
        for (q_len, kv_len), count in self._row_counts().items():
            position = kv_len - q_len
            ends = q_len * kv_len if right == UNLIMITED else _sum(position + right + 1, q_len, kv_len)
            hidden = 0 if left == UNLIMITED else _sum(position - left, q_len, kv_len)
            total += count * (ends - hidden)
        return total

    def flops(self) -> int:
        """Operations of both matmuls, a multiply-add as two, of visible pairs only (docs/math.md, "Cost")."""
        return 4 * self.visible_pairs() * self.q_heads * self.head_dim

    def bytes(self) -> int:
        """Fewest bytes through device memory: q, k, v read once and out written once."""
        rows = self._row_counts().items()
        q_tokens, kv_tokens = sum(q * n for (q, _), n in rows), sum(kv * n for (_, kv), n in rows)
        q_bytes = 2 * q_tokens * self.q_heads * self.head_dim * DTYPE_BYTES[self.dtype]
        kv_bytes = 2 * kv_tokens * self.kv_heads * self.head_dim * DTYPE_BYTES[self.kv_dtype or self.dtype]
        return q_bytes + kv_bytes

    def __str__(self) -> str:
        layout = type(self.layout).__name__.lower()
        parts = [
            f"{layout} batch {self.batch}, q_len {self.q_len}, kv_len {self.kv_len}",
            f"heads {self.q_heads}/{self.kv_heads}, head_dim {self.head_dim}, {self.dtype} on {self.device}",
        ]
        if self.paged:
            parts.append(f"page_size {self.page_size}")
        if self.kv_dtype != self.dtype:
            parts.append(f"cache in {self.kv_dtype}")
        if self.masked:
            parts.append("causal" if self.window == (UNLIMITED, 0) else f"window {self.window}")
        if self.softcap:
            parts.append(f"softcap {self.softcap:g}")
        if self.sinks is not None:
            parts.append("sinks")
        if self.bias is not None:
            parts.append("bias")
        return ", ".join(parts)
