"""The decode projection for more tokens: one launch, every weight read once, multiplied by whole warpgroups.

Programmatic launches as in `cuda_skinny`: a projection's tensors must not be rewritten in place once it has
run. RMSNorm's factor is applied behind the product: x times the norm's weight is what must be finite, which
in float16 ends at 65504.
"""

from __future__ import annotations

import ctypes
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from strobe.cuda import jit
from strobe.device import gpu
from strobe.linear import cuda_call
from strobe.linear.problem import LinearProblem
from strobe.linear.projection import Projection

IDEA = "rows of the weight by wgmma from rings that the copy engine fills; all around the product fused"

_SOURCE = Path(__file__).with_suffix(".cu")
_TOKENS_MIN, _TOKENS_MIN_GATED, _TOKENS_MAX = 17, 9, 64
"""`cuda_skinny` is the faster for fewer: at 16 tokens a layer whose SwiGLU alone is here takes 2 to 4 % less,
with the others here too as much as without; at 8 tokens SwiGLU here gains 0 to 2 %."""
_DTYPES = ("bfloat16", "float16")
_COLUMNS, _ROWS = 64, 64  # of a stage of cuda_wgmma.cu, of its products
_ROWS_MAX = 128
_STAGES_MAX = 16
_X_BYTES, _X_STAGES_MAX = 40 * 1024, 8
"""x's ring hides the way to L2: at 32 tokens 3 stages took 1 to 18 % longer than 8, and 12 as long."""
_BLOCK_RESERVES = 1024
"""Bytes of an SM's shared memory that each block takes besides its own."""
_GRAIN = 128
"""Bytes in which an SM hands out shared memory."""


def refusals(problem: LinearProblem) -> list[str]:
    reasons = []
    if problem.device != "cuda" or problem.arch != 90:
        reasons.append("needs a Hopper GPU (compute capability 9.0)")
    if problem.dtype not in _DTYPES:
        reasons.append(f"dtype {problem.dtype}; supported: {', '.join(_DTYPES)}")
    fewest = _TOKENS_MIN_GATED if problem.swiglu else _TOKENS_MIN
    if not fewest <= problem.tokens <= _TOKENS_MAX:
        reasons.append(f"{problem.tokens} tokens; supported: {fewest} to {_TOKENS_MAX}")
    if problem.inputs % 8 or not problem.inputs:
        reasons.append(f"inputs {problem.inputs}; supported: multiples of 8")
    if problem.append is not None:
        reasons.append("fuses no append")
    elif problem.columns % 4 or not problem.columns:
        reasons.append(f"{problem.columns} columns of the result; supported: multiples of 4")
    return reasons


@dataclass(frozen=True)
class Shape:
    """How the kernel is built and launched: clusters of `cluster` blocks, one for `each` units of the result.
    A unit is one row of the weight, or with SwiGLU two."""

    tokens: int
    """A multiple of 16, at least as many as there are."""
    each: int
    cluster: int
    stages: int
    x_stages: int
    blocks: int
    shared_bytes: int

    def defines(self, problem: LinearProblem) -> dict[str, jit.Define]:
        return {
            "scalar_t": jit.SCALAR[problem.dtype],
            "SWIGLU": problem.swiglu,
            "NORM": problem.norm,
            "TOKENS": self.tokens,
            "PART": _round_up(self.each, 8),
            "CLUSTER": self.cluster,
            "STAGES": self.stages,
            "X_STAGES": self.x_stages,
        }


def choose_shape(problem: LinearProblem, sm_count: int, shared_bytes: int) -> Shape:
    """For a device of `sm_count` SMs whose blocks may have `shared_bytes`.

    Blocks are equal and run all at once. Where pairs of blocks, one an SM, need no more than `_ROWS_MAX`
    rows each, that is what they are: they take just more than half of an SM, so that no SM gets two of them,
    and the blocks of the others, which stand two an SM, a little less, so that they fit beside these. Fewer
    rows than a product has would leave a ring half empty: there, clusters are larger.
    """
    parts = 2 if problem.swiglu else 1
    half = (shared_bytes + _BLOCK_RESERVES) // 2 - _BLOCK_RESERVES

    def rows(clusters: int) -> int:
        return parts * _round_up(-(-problem.columns // max(1, clusters)), 4)

    if rows(sm_count // 2) <= _ROWS_MAX:
        cluster, clusters, room = 2, sm_count // 2, half + _GRAIN
        if rows(clusters) < _ROWS:
            # Those of four stand within a GPC, whose SMs are not all used: an H200 holds 30.
            cluster, clusters = 4, sm_count // 4 - sm_count // 44
    else:
        cluster = 1 if rows(2 * sm_count) >= _ROWS else 2
        clusters, room = 2 * sm_count // cluster, half - 2 * _BLOCK_RESERVES
    clusters, rounds = max(1, clusters), 1
    while rows(rounds * clusters) > _ROWS_MAX:
        rounds += 1
    each = rows(rounds * clusters) // parts
    return _fill(problem, each, cluster, room)


def _fill(problem: LinearProblem, each: int, cluster: int, room: int) -> Shape:
    """With rings as deep as `room` bytes allow."""
    tokens, parts = _round_up(problem.tokens, 16), 2 if problem.swiglu else 1
    column = 2 * _COLUMNS  # bytes of a row in a stage
    stage, x_stage = column * max(parts * _round_up(each, 8), _ROWS), column * tokens
    for stages in range(_STAGES_MAX, 1, -1):
        x_stages = min(stages, _X_STAGES_MAX, _X_BYTES // x_stage)
        gains, barriers = x_stages if problem.norm else 1, 2 * (stages + x_stages) + 1
        if stages * stage + x_stages * x_stage + gains * column + barriers * 8 <= room:
            break
    blocks = -(-problem.columns // each) * cluster
    return Shape(tokens, each, cluster, stages, x_stages, blocks, shared_bytes=room)


class _Params(ctypes.Structure):
    """`Params` of cuda_wgmma.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("bias", "out")),
        *((name, ctypes.c_int) for name in ("tokens", "inputs", "units", "each", "residual")),
        ("norm_eps", ctypes.c_float),
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
        shared = cuda_call.parameters(problem, projection, bias, shape.each)
        self._params = _Params(units=problem.columns, **shared)
        weights = jit.tensor_map(weight.data_ptr(), *_matrix(problem, problem.outputs, shape.each))
        gains = weights
        if norm is not None:
            gains = jit.tensor_map(norm.data_ptr(), *_matrix(problem, 1, 1), swizzle=0)
        self._tokens = _matrix(problem, problem.tokens, shape.tokens)
        kernel = jit.kernel(_SOURCE, "project", shape.defines(problem), device.index)
        kernel.prefer_shared_memory()  # else there may be no room for the next kernel's blocks
        self._launch = kernel.prepare(
            shape.blocks,
            288 if problem.norm else 160,
            [weights, jit.TensorMap(), gains, self._params],
            shared_bytes=shape.shared_bytes,
            cluster=shape.cluster if shape.cluster > 1 else None,
            programmatic=programmatic,
        )
        self._lock = threading.Lock()  # between setting the addresses and launching

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """x and out as `LinearProblem` has them."""
        x = cuda_call.on_16_bytes(x)
        tokens = jit.tensor_map(x.data_ptr(), *self._tokens)
        with self._lock:
            self._launch.point(1, ctypes.addressof(tokens))
            self._params.out = out.data_ptr()
            self._launch()


def run(problem: LinearProblem, x: torch.Tensor, projection: Projection, out: torch.Tensor) -> None:
    cuda_call.packed("cuda_wgmma", Packed, problem, projection)(x, out)


def source(problem: LinearProblem) -> jit.Source:
    """What this problem compiles on the current GPU."""
    device = gpu(torch.cuda.current_device())
    shape = choose_shape(problem, device.sm_count, device.shared_memory_per_block)
    return jit.Source(_SOURCE, shape.defines(problem))


def sources(arch: str) -> list[jit.Source]:
    """The projections of Llama-3-8B at 32 tokens, as an H200 runs them, and at 64 with most registers."""
    if arch != "sm_90a":
        return []
    problems = []
    for dtype in _DTYPES:
        normed = LinearProblem(32, 4096, 6144, dtype, norm=True, device="cuda", arch=90)
        onto = LinearProblem(32, 4096, 4096, dtype, residual=True, device="cuda", arch=90)
        gated = LinearProblem(32, 4096, 28672, dtype, norm=True, swiglu=True, device="cuda", arch=90)
        problems += [normed, onto, gated, *(replace(each, tokens=64) for each in (normed, gated))]
    return [jit.Source(_SOURCE, choose_shape(each, 132, 227 * 1024).defines(each)) for each in problems]


def _matrix(problem: LinearProblem, rows: int, box: int) -> tuple[Any, ...]:
    """A tensor map's arguments: `[rows, inputs]`, contiguous, in boxes of `box` rows of a stage's columns."""
    sizes, strides = (problem.inputs, rows, 1, 1, 1), (2 * problem.inputs, 16, 16, 16)
    return problem.dtype, sizes, strides, (_COLUMNS, box, 1, 1, 1)


def _round_up(n: int, to: int) -> int:
    return -(-n // to) * to
