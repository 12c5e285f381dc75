"""The decode projection: one launch, every weight read once, started before the kernel ahead has ended.

A packed launch is kept with its projection, so that a call sets two addresses and launches. Launches are
programmatic: weights are asked for while the kernel ahead still runs. So a projection's tensors must not
be rewritten in place once it has run. What wrote them in the first place is waited for: a projection's
first launch is an ordinary one.
"""

from __future__ import annotations

import ctypes
import threading
from dataclasses import dataclass
from pathlib import Path

import torch

from strobe.cuda import jit
from strobe.device import gpu
from strobe.linear import cuda_call
from strobe.linear.problem import LinearProblem
from strobe.linear.projection import Projection

IDEA = "a block an SM, bulk copies ahead of the tensor cores and of the kernel ahead, all around it fused"

_SOURCE = Path(__file__).with_suffix(".cu")
_TOKENS_MAX = 8
_DTYPES = ("bfloat16", "float16")
_MOST_STAGES, _MOST_SLOTS = 16, 4  # of cuda_skinny.cu
_STATIC_BYTES = 1024  # its barriers and sums of squares, rounded up


def refusals(problem: LinearProblem) -> list[str]:
    reasons = []
    if problem.device != "cuda" or problem.arch < 90:
        reasons.append("needs an NVIDIA GPU with bulk copies (compute capability 9.0 and up)")
    if problem.dtype not in _DTYPES:
        reasons.append(f"dtype {problem.dtype}; supported: {', '.join(_DTYPES)}")
    if problem.tokens > _TOKENS_MAX:
        reasons.append(f"{problem.tokens} tokens; supported: up to {_TOKENS_MAX}")
    if problem.inputs % 8 or not problem.inputs:
        reasons.append(f"inputs {problem.inputs}; supported: multiples of 8")
    return reasons


@dataclass(frozen=True)
class Shape:
    """How the kernel is built and launched.

    A stage of the weights' ring is 16 rows of `chunk` columns, each row `pad` bytes longer. `warps` share
    its columns, `fetchers` its copies, and `tiles` of 16 rows go through one reading of x. `ahead` stages
    behind the ring are brought into L2 at the start. The kernel behind may start when `trigger` stages
    are left, None: as many as the ring has. `blocks` share an SM with as many of the next kernel's.
    """

    chunk: int = 512
    warps: int = 4
    fetchers: int = 2
    tiles: int = 4
    pad: int = 64
    ahead: int = 0
    trigger: int | None = None
    blocks: int = 1

    @property
    def pitch(self) -> int:
        return 2 * self.chunk + self.pad

    @property
    def threads(self) -> int:
        return 32 * (self.warps + self.fetchers + 1)

    def defines(self, dtype: str, swiglu: bool) -> dict[str, jit.Define]:
        return {
            "scalar_t": cuda_call.SCALAR[dtype],
            "SWIGLU": swiglu,
            "CHUNK": self.chunk,
            "WARPS": self.warps,
            "FETCHERS": self.fetchers,
            "TILES": self.tiles,
            "PAD": self.pad,
        }

    def rings(self, tokens: int, norm: bool, shared_bytes: int) -> tuple[int, int, int]:
        """Stages of the weights' ring, slots of x's, and the dynamic shared memory of a block in bytes.

        Twice as many blocks as run at a time fit an SM, so that the next kernel's are there early; where
        that leaves fewer than 3 stages, as many as run.
        """
        sums = 4 * self.warps * tokens * (16 * self.tiles + 4)
        slot = (tokens + norm) * self.pitch
        slots = _MOST_SLOTS if slot <= 4096 else 2
        stages, room = 0, 0
        for resident in (2 * self.blocks, self.blocks):
            room = (shared_bytes + 1024) // resident - 1024 - _STATIC_BYTES  # each block costs 1 KiB more
            stages = min(_MOST_STAGES, (room - sums - slots * slot) // (16 * self.pitch))
            if stages >= 3:
                break
        return stages, slots, stages * 16 * self.pitch + slots * slot + sums


_SHAPE = Shape()


class _Params(ctypes.Structure):
    """`Params` of cuda_skinny.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "norm", "out")),
        *((name, ctypes.c_int) for name in ("tokens", "inputs", "outputs", "each", "more", "residual")),
        *((name, ctypes.c_int) for name in ("stages", "slots", "ahead", "trigger")),
        ("norm_eps", ctypes.c_float),
    ]


class Packed:
    """One projection at one number of tokens, ready to launch on its device; for several threads.

    Args:
        problem: one that is not refused.
        projection: its tensors are read where they are now.
        shape: how the kernel is built.
        programmatic: may start before the kernel ahead of it in the stream ends.
    """

    def __init__(
        self, problem: LinearProblem, projection: Projection, shape: Shape, *, programmatic: bool
    ) -> None:
        weight = _on_16_bytes(projection.weight)
        norm = _on_16_bytes(projection.norm) if problem.norm and projection.norm is not None else None
        self._constants = weight, norm
        device = gpu(weight.get_device())
        stages, slots, shared_bytes = shape.rings(
            problem.tokens, problem.norm, device.shared_memory_per_block
        )
        blocks = min(problem.columns, shape.blocks * device.sm_count)
        self._params = _Params(
            weight=weight.data_ptr(),
            bias=None if projection.bias is None else projection.bias.data_ptr(),
            norm=None if norm is None else norm.data_ptr(),
            tokens=problem.tokens,
            inputs=problem.inputs,
            outputs=problem.outputs,
            each=problem.columns // blocks,
            more=problem.columns % blocks,
            residual=problem.residual,
            stages=stages,
            slots=slots,
            ahead=shape.ahead,
            trigger=stages if shape.trigger is None else shape.trigger,
            norm_eps=projection.norm_eps,
        )
        kernel = jit.kernel(_SOURCE, "project", shape.defines(problem.dtype, problem.swiglu), device.index)
        kernel.prefer_shared_memory()  # else there may be no room for the next kernel's blocks
        self._launch = kernel.prepare(
            blocks,
            shape.threads,
            self._params,
            shared_bytes=shared_bytes,
            programmatic=programmatic,
        )
        self._lock = threading.Lock()  # between setting the addresses and launching

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """x and out as `LinearProblem` has them."""
        address = x.data_ptr()
        if address % 16:
            x = x.clone()
            address = x.data_ptr()
        with self._lock:
            self._params.x, self._params.out = address, out.data_ptr()
            self._launch()


def run(problem: LinearProblem, x: torch.Tensor, projection: Projection, out: torch.Tensor) -> None:
    key = ("cuda_skinny", problem.tokens, problem.norm, problem.swiglu, problem.residual)
    packed = projection.scratch.get(key)
    if packed is not None:
        packed(x, out)
        return
    capturing = torch.cuda.is_current_stream_capturing()
    Packed(problem, projection, _SHAPE, programmatic=capturing)(x, out)
    projection.scratch[key] = Packed(problem, projection, _SHAPE, programmatic=True)


def sources(arch: str) -> list[jit.Source]:
    if int("".join(digit for digit in arch if digit.isdigit())) < 90:
        return []
    return [
        jit.Source(_SOURCE, _SHAPE.defines(dtype, swiglu)) for dtype in _DTYPES for swiglu in (False, True)
    ]


def _on_16_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone() if tensor.data_ptr() % 16 else tensor
