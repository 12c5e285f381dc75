"""The decode projection: one launch, every weight read once, started before the kernel ahead has ended.

A packed launch is kept with its projection, so that a call sets two addresses and launches. Launches are
programmatic: weights are asked for while the kernel ahead still runs. So a projection's tensors must not
be rewritten in place once it has run. What wrote them in the first place is waited for: a projection's
first launch is an ordinary one.

Behind the projection to queries, keys and values it is `cache.append_rotated` too. The block that computes a
feature computes the one that rope turns it with, since rows of the weight are dealt in such pairs. It may
write to the cache while others run: when its wait returns the kernel ahead has ended, and so had all before
that one, which waited themselves; nobody reads this layer's keys any more. Attention behind it may start
before it ends, and then reads older keys, which nobody writes, and the new ones behind a wait of its own.

RMSNorm's factor is applied behind the product: x times the norm's weight is what must be finite, which
in float16 ends at 65504.
"""

from __future__ import annotations

import ctypes
import threading
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from strobe.cuda import jit
from strobe.device import gpu
from strobe.linear import cuda_call
from strobe.linear.problem import Append, LinearProblem
from strobe.linear.projection import Projection
from strobe.ops import cache

IDEA = "weights to each lane's own ring, ahead of tensor cores and of the kernel ahead; all around it fused"

_SOURCE = Path(__file__).with_suffix(".cu")
_TOKENS_MAX = 16
_DTYPES = ("bfloat16", "float16")
_FP8 = "float8_e4m3fn"
_WARPS, _ROWS, _STEPS = 8, 8, 2  # of cuda_skinny.cu
_STAGES_MAX = 8
_BLOCK_RESERVES = 1024
"""Bytes of an SM's shared memory that each block takes besides its own."""
_GRAIN = 128
"""Bytes in which an SM hands out shared memory."""


def refusals(problem: LinearProblem) -> list[str]:
    reasons = []
    if problem.device != "cuda" or problem.arch < 80:
        reasons.append("needs an NVIDIA GPU with asynchronous copies (compute capability 8.0 and up)")
    if problem.dtype not in _DTYPES:
        reasons.append(f"dtype {problem.dtype}; supported: {', '.join(_DTYPES)}")
    if problem.tokens > _TOKENS_MAX:
        reasons.append(f"{problem.tokens} tokens; supported: up to {_TOKENS_MAX}")
    if problem.inputs % 8 or not problem.inputs:
        reasons.append(f"inputs {problem.inputs}; supported: multiples of 8")
    if problem.append is not None:
        reasons += _refused_heads(problem, problem.append)
    return reasons


def _refused_heads(problem: LinearProblem, heads: Append) -> list[str]:
    reasons = []
    if heads.head_norms:
        reasons.append("norms of heads before they are rotated: a head's features are many blocks'")
    if heads.head_dim % 2:
        reasons.append(f"head_dim {heads.head_dim}; supported: even ones")
    if heads.kv_dtype not in (problem.dtype, _FP8):
        reasons.append(f"cache in {heads.kv_dtype}; supported: {problem.dtype}, {_FP8}")
    elif heads.kv_dtype == _FP8 and problem.arch < 89:
        reasons.append(f"cache in {_FP8}; needs compute capability 8.9 and up")
    return reasons


@dataclass(frozen=True)
class Shape:
    """How the kernel is built and launched: `blocks` of `each` units, in `tiles` of 8 rows of the weight,
    each warp's ring of `stages`. A unit is one row, or two that belong together."""

    tokens: int
    """A power of two, at least as many as there are."""
    tiles: int
    each: int
    blocks: int
    stages: int
    shared_bytes: int

    def defines(self, problem: LinearProblem) -> dict[str, jit.Define]:
        heads, scalar = problem.append, jit.SCALAR[problem.dtype]
        return {
            "scalar_t": scalar,
            "kv_t": "u8" if heads is not None and heads.kv_dtype == _FP8 else scalar,
            "HEAD_DIM": 0 if heads is None else heads.head_dim,
            "SWIGLU": problem.swiglu,
            "NORM": problem.norm,
            "TOKENS": self.tokens,
            "TILES": self.tiles,
            "DEPTH": self.stages,
        }


def choose_shape(problem: LinearProblem, sm_count: int, shared_bytes: int) -> Shape:
    """For a device of `sm_count` SMs whose blocks may have `shared_bytes`.

    Blocks are equal, a whole number of rounds of one an SM, or of two where two fit, each of up to `most`
    tiles: larger ones read x less often, smaller ones leave a shorter tail and a deeper ring. 6 was the
    best of 3 to 6 for up to 4 tokens, 5 for 8, 8 of 4 to 10 for 16. Up to 4 tokens leave no SM with one
    block of more than 3: two of half the size take 2 µs less of a layer's 110.
    """
    tokens = 1 << (problem.tokens - 1).bit_length()
    few = tokens <= 4
    paired = problem.swiglu or problem.append is not None
    units, rows = (problem.outputs // 2, _ROWS // 2) if paired else (problem.outputs, _ROWS)  # all, a tile's
    tiles = -(-units // rows)
    squares = 4 * _WARPS * tokens  # their sums, where there is a norm: beside the rings
    for most in (6, 5, 4, 3, 2, 1) if few else (5, 4, 3, 2, 1) if tokens == 8 else (8, 5, 4, 3, 2, 1):
        rounds = -(-tiles // (most * sm_count))
        if few and most > 3 and rounds == 1:
            continue
        if rounds > 1 and tokens <= 8:
            rounds += rounds % 2
        each = -(-units // (rounds * sm_count))
        held = -(-each // rows)
        stage = _WARPS * 16 * _STEPS * (32 * held + 4 * tokens + 4 * problem.norm)
        room = _room(problem, shared_bytes, even=few and rounds > 1, share=stage * _stages(problem))
        stages = min(_STAGES_MAX, (room - squares) // stage)
        if stages >= 2:
            break
    sums = 4 * _WARPS * problem.tokens * (_ROWS * held + 4)
    taken = max(stages * stage, sums)
    if problem.residual and 2 * (room + _BLOCK_RESERVES) > shared_bytes:  # one an SM
        taken = max(taken, min(room, shared_bytes - squares))
    return Shape(tokens, held, each, -(-units // each), stages, taken)


def _stages(problem: LinearProblem) -> int:
    """That a warp goes through."""
    return -(-problem.inputs // (_WARPS * _STEPS * 32))


def _room(problem: LinearProblem, shared_bytes: int, *, even: bool, share: int) -> int:
    """Bytes for a block, so that the next kernel's fits beside it.

    Two blocks that fit on one SM may both be given to the one that is free first, and another gets none. That
    costs nothing where there are two for each (`even`), or where a block's `share` of the weights is in its
    ring before it waits. Else those that add to a residual take more than half of an SM, and the others less:
    a layer of Llama-3-8B takes 115 µs, and 128 where both take half. It is as little more as there is, since
    `cuda_cluster` takes as little less for one row: they fit beside one another. With more than eight
    tokens deeper rings are worth more than an early start.
    """
    if problem.tokens > 8:
        return shared_bytes
    half = (shared_bytes + _BLOCK_RESERVES) // 2 - _BLOCK_RESERVES
    less = half - 2 * _BLOCK_RESERVES
    spread = even or (problem.tokens <= 4 and share <= less)
    return half + _GRAIN if problem.residual and not spread else less


class _Heads(ctypes.Structure):
    """`Heads` of appended_heads.cuh."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("cos", "sin", "slots", "k_pages", "v_pages")),
        *((name, ctypes.c_void_p) for name in ("k_scale", "v_scale")),
        *((name, ctypes.c_int) for name in ("q_heads", "kv_heads")),
    ]

    def point(self, to: cache.Destination) -> None:
        self.cos, self.sin = to.turn[0].data_ptr(), to.turn[1].data_ptr()
        self.slots, self.k_pages, self.v_pages = [x.data_ptr() for x in (to.slots, to.k_pages, to.v_pages)]
        k_scale, v_scale = to.options.scales or (None, None)
        self.k_scale = None if k_scale is None else k_scale.data_ptr()
        self.v_scale = None if v_scale is None else v_scale.data_ptr()


class _Params(ctypes.Structure):
    """`Params` of cuda_skinny.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "norm", "out")),
        *((name, ctypes.c_int) for name in ("tokens", "inputs", "outputs", "each", "residual")),
        ("norm_eps", ctypes.c_float),
        ("heads", _Heads),
    ]


class Packed:
    """One projection at one number of tokens, ready to launch on its device; for several threads.

    Args:
        problem: one that is not refused.
        projection: its tensors are read where they are now.
        programmatic: may start before the kernel ahead of it in the stream ends.
    """

    def __init__(self, problem: LinearProblem, projection: Projection, *, programmatic: bool) -> None:
        self._constants = weight, bias, norm = cuda_call.constants(problem, projection)
        device = gpu(weight.get_device())
        shape = choose_shape(problem, device.sm_count, device.shared_memory_per_block)
        self._params = _Params(
            weight=weight.data_ptr(),
            norm=None if norm is None else norm.data_ptr(),
            outputs=problem.outputs,
            **cuda_call.parameters(problem, projection, bias, shape.each),
        )
        if problem.append is not None:
            self._params.heads.q_heads = problem.append.q_heads
            self._params.heads.kv_heads = problem.append.kv_heads
        kernel = jit.kernel(_SOURCE, "project", shape.defines(problem), device.index)
        kernel.prefer_shared_memory()  # else there may be no room for the next kernel's blocks
        self._launch = kernel.prepare(
            shape.blocks,
            32 * _WARPS,
            self._params,
            shared_bytes=shape.shared_bytes,
            programmatic=programmatic,
        )
        self._lock = threading.Lock()  # between setting the addresses and launching

    def __call__(self, x: torch.Tensor, out: torch.Tensor, to: cache.Destination | None = None) -> None:
        """x and out as `LinearProblem` has them; `to` where it appends."""
        x = cuda_call.on_16_bytes(x)
        with self._lock:
            self._params.x, self._params.out = x.data_ptr(), out.data_ptr()
            if to is not None:
                self._params.heads.point(to)
            self._launch()


def run(
    problem: LinearProblem,
    x: torch.Tensor,
    projection: Projection,
    out: torch.Tensor,
    to: cache.Destination | None = None,
) -> None:
    cuda_call.packed("cuda_skinny", Packed, problem, projection)(x, out, to)


def append(
    problem: LinearProblem, x: torch.Tensor, projection: Projection, to: cache.Destination, out: torch.Tensor
) -> None:
    """`run` of a problem that appends: `out` are the queries."""
    run(problem, x, projection, out, to)


def source(problem: LinearProblem) -> jit.Source:
    """What this problem compiles on the current GPU."""
    device = gpu(torch.cuda.current_device())
    shape = choose_shape(problem, device.sm_count, device.shared_memory_per_block)
    return jit.Source(_SOURCE, shape.defines(problem))


def sources(arch: str) -> list[jit.Source]:
    """The projections of Llama-3-8B at one token, as an H200 runs them."""
    number = jit.arch_number(arch)
    problems = []
    for dtype in _DTYPES:
        plain = LinearProblem(1, 4096, 128256, dtype, norm=True, device="cuda", arch=number)
        problems += [
            replace(plain, outputs=6144, append=Append(32, 8, 128, dtype)),
            replace(plain, outputs=6144, append=Append(32, 8, 128, _FP8)),
            replace(plain, outputs=4096, norm=False, residual=True),
            replace(plain, outputs=28672, swiglu=True),
            plain,
        ]
    return [
        jit.Source(_SOURCE, choose_shape(problem, 132, 227 * 1024).defines(problem))
        for problem in problems
        if not refusals(problem)
    ]
