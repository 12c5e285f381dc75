"""`Projection`: one weight, and what stands before and behind its product."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import torch

from strobe.cpu import jit
from strobe.errors import ProblemError
from strobe.linear import ladder
from strobe.linear.problem import Append, LinearProblem
from strobe.ops import activation, cache
from strobe.ops.norm import rms_norm


def empty_weight(
    outputs: int, inputs: int, *, device: torch.device | str, dtype: torch.dtype
) -> torch.Tensor:
    """An uninitialised weight `[outputs, inputs]`, laid out as its device multiplies it fastest.

    A GPU's lies output by output, contiguous. A CPU's lies input by input: one token's product then
    adds up rows of memory in order instead of taking a dot product a row, which was 1.4 times as fast
    (float32, 256 to 1408 features, one core), and no slower for many tokens.
    """
    if torch.device(device).type == "cpu":
        return torch.empty(inputs, outputs, device=device, dtype=dtype).t()
    return torch.empty(outputs, inputs, device=device, dtype=dtype)


_NARROW_BYTES = 1 << 26
"""Larger weights are not kept twice: their users count on the memory."""


def is_narrow(weight: torch.Tensor) -> bool:
    """Whether a CPU's float32 weight is to be kept in bfloat16 too, which holds each of its numbers.

    False for tensors of inference_mode: it would not be noticed what is written to them.
    """
    kept_once = weight.is_cuda or weight.nbytes > _NARROW_BYTES or weight.is_inference()
    if kept_once or weight.dtype != torch.float32:
        return False
    return torch.equal(weight.bfloat16().float(), weight)


@dataclass(frozen=True, eq=False)
class Projection:
    """`rms_norm(x) @ weightᵀ + bias`, then SwiGLU, then onto a residual: each where there is one.

    A model says what it wants; the rung that runs it fuses these, or they are taken one by one.

    Args:
        weight: `[outputs, inputs]`; contiguous on a GPU, in any layout on a CPU (`empty_weight`).
        bias: `[outputs]` or None.
        norm: RMSNorm's weight `[inputs]`, applied to x first, or None.
        norm_eps: RMSNorm's epsilon.
        swiglu: the weight holds the gate's rows, then as many of up: the result is `silu(gate) * up`.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    norm: torch.Tensor | None = None
    norm_eps: float = 0.0
    swiglu: bool = False

    @classmethod
    def empty(
        cls,
        outputs: int,
        inputs: int,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        bias: bool = False,
        norm_eps: float | None = None,
        swiglu: bool = False,
    ) -> Projection:
        """An uninitialised one, with a norm where `norm_eps` is given."""
        return cls(
            empty_weight(outputs, inputs, device=device, dtype=dtype),
            bias=torch.empty(outputs, device=device, dtype=dtype) if bias else None,
            norm=None if norm_eps is None else torch.empty(inputs, device=device, dtype=dtype),
            norm_eps=norm_eps or 0.0,
            swiglu=swiglu,
        )

    @cached_property
    def scratch(self) -> dict[Any, Any]:
        """What rungs keep that they prepared for this projection."""
        return {}

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, kernel: str = "auto"
    ) -> torch.Tensor:
        """The result `[tokens, outputs]`, or with SwiGLU `[tokens, outputs / 2]`, of x's dtype.

        Args:
            x: `[tokens, inputs]`, contiguous.
            residual: contiguous, shaped as the result, which is added to it in place and returned.
            kernel: "auto" for the fastest rung that fits, a rung's name, or several as
                "cuda_gemv,torch_linear": the first that fits.

        Raises:
            ProblemError: shapes, dtypes or devices that do not fit together, the projection's own too.
            UnknownNameError, KernelRefusedError: as `ladder.choose`.
        """
        added = None if residual is None else (residual.shape, residual.dtype, residual.device)
        problem, rung, fused = _plan(kernel, self._kind, x.shape, x.dtype, x.device, added, None)
        if not x.is_contiguous() or not (residual is None or residual.is_contiguous()):
            raise ProblemError("x or residual is not contiguous; supported: contiguous ones")
        if fused:
            out = x.new_empty(problem.tokens, problem.columns) if residual is None else residual
            if problem.tokens:
                rung.run(problem, x, self, out)
            return out
        if self.norm is not None:
            x = rms_norm(x, self.norm, self.norm_eps)
        out = x.new_empty(problem.tokens, problem.outputs)
        if problem.tokens:
            rung.run(problem, x, self, out)
        if self.swiglu:
            out = activation.swiglu(out)
        return out if residual is None else residual.add_(out)

    def append(self, x: torch.Tensor, to: cache.Destination, kernel: str = "auto") -> torch.Tensor:
        """Queries, keys and values of x, which its outputs are in this order: `cache.append_rotated` of them.

        Returns the queries, rotated, `[tokens, q_heads, head_dim]`. x, `kernel` and errors as in a call.
        """
        pages, normed = to.k_pages, to.options.norms is not None
        call = x.shape, x.dtype, x.device, pages.shape, pages.dtype, normed
        (q_heads, kv_heads, head_dim), problem, rung, fused = _plan_append(kernel, self._kind, *call)
        if not fused:
            qkv = self(x, kernel=kernel).view(-1, q_heads + 2 * kv_heads, head_dim)
            qk, v = qkv.split_with_sizes((q_heads + kv_heads, kv_heads), 1)
            return cache.append_rotated(qk, v, *to)
        if not x.is_contiguous():
            raise ProblemError("x is not contiguous; supported: a contiguous one")
        q = x.new_empty(problem.tokens, q_heads, head_dim)
        if problem.tokens:
            rung.append(problem, x, self, to, q)
        return q

    def source(
        self, tokens: int, *, residual: bool, append: Append | None = None, kernel: str = "auto"
    ) -> Any:
        """What a call of so many tokens compiles, as `ladder.Rung.source`; errors as `ladder.choose`."""
        problem = replace(self.problem(tokens), residual=residual, append=append)
        rung, run = ladder.choose(problem, kernel)
        if append is not None and run != problem:
            return self.source(tokens, residual=residual, kernel=kernel)
        return rung.source(run)

    def problem(self, tokens: int) -> LinearProblem:
        """What a call with so many tokens asks of a rung."""
        return replace(self._kind.problem, tokens=tokens)

    @cached_property
    def _kind(self) -> _Kind:
        """Its sizes and kinds, checked; the same object for every projection that is alike."""
        weight = self.weight
        if weight.dim() != 2:
            raise ProblemError(f"weight is {list(weight.shape)}; supported: [outputs, inputs]")
        outputs, inputs = weight.shape
        for name, tensor, size in (("bias", self.bias, outputs), ("norm", self.norm, inputs)):
            if tensor is None:
                continue
            if list(tensor.shape) != [size] or not tensor.is_contiguous():
                raise ProblemError(f"{name} is {list(tensor.shape)}; supported: [{size}], contiguous")
            if (tensor.dtype, tensor.device) != (weight.dtype, weight.device):
                raise ProblemError(f"{name} is {_of(tensor)}, weight {_of(weight)}; supported: alike")
        if self.swiglu and outputs % 2:
            raise ProblemError(f"weight has {outputs} outputs; supported with SwiGLU: an even number")
        if weight.is_cuda and not weight.is_contiguous():
            raise ProblemError("weight is not contiguous; supported on a GPU: a contiguous one")
        input_major = weight.t().is_contiguous()
        narrow = input_major and not jit.refusals() and is_narrow(weight)
        around = (self.bias is not None, self.norm is not None, self.swiglu, input_major, narrow)
        return _intern(weight.shape, weight.dtype, weight.device, *around)


@dataclass(frozen=True, eq=False)
class _Kind:
    """What all calls of projections that are alike share. Compared by identity, which is quick."""

    problem: LinearProblem
    """Of no tokens."""
    dtype: torch.dtype
    device: torch.device


@functools.cache
def _intern(
    shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    bias: bool,
    norm: bool,
    swiglu: bool,
    input_major: bool,
    narrow: bool,
) -> _Kind:
    arch = 0
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        arch = 10 * major + minor
    problem = LinearProblem(
        tokens=0,
        inputs=shape[1],
        outputs=shape[0],
        dtype=str(dtype).removeprefix("torch."),
        bias=bias,
        norm=norm,
        swiglu=swiglu,
        device=device.type,
        arch=arch,
        input_major=input_major,
        narrow=narrow,
    )
    return _Kind(problem, dtype, device)


@lru_cache(maxsize=4096)
def _plan(
    kernel: str,
    kind: _Kind,
    shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    residual: tuple[torch.Size, torch.dtype, torch.device] | None,
    append: Append | None,
) -> tuple[LinearProblem, ladder.Rung, bool]:
    """What the rung is asked to run, the rung, and whether that is all there is to do."""
    sizes = kind.problem
    if len(shape) != 2 or shape[1] != sizes.inputs:
        given = f"x is {list(shape)}, weight {[sizes.outputs, sizes.inputs]}"
        raise ProblemError(f"{given}; supported: [tokens, inputs] and [outputs, inputs]")
    if (dtype, device) != (kind.dtype, kind.device):
        given = f"x is {dtype} on {device}, weight {kind.dtype} on {kind.device}"
        raise ProblemError(f"{given}; supported: one dtype, one device")
    if residual not in (None, (torch.Size((shape[0], sizes.columns)), dtype, device)):
        given = f"residual is {residual[1]} {list(residual[0])} on {residual[2]}"
        raise ProblemError(f"{given}; supported: {dtype} {[shape[0], sizes.columns]} on {device}")
    problem = replace(sizes, tokens=shape[0], residual=residual is not None, append=append)
    rung, run = ladder.choose(problem, kernel)
    return run, rung, run == problem


@lru_cache(maxsize=4096)
def _plan_append(
    kernel: str,
    kind: _Kind,
    shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    pages_shape: torch.Size,
    pages_dtype: torch.dtype,
    head_norms: bool,
) -> tuple[tuple[int, int, int], LinearProblem, ladder.Rung, bool]:
    """What the outputs are, (q_heads, kv_heads, head_dim), then as `_plan`."""
    outputs, (*_, kv_heads, head_dim) = kind.problem.outputs, pages_shape
    q_heads = outputs // head_dim - 2 * kv_heads
    if outputs % head_dim or q_heads < 1:
        given = f"weight has {outputs} outputs, a cache's token {[kv_heads, head_dim]}"
        raise ProblemError(f"{given}; supported: (q_heads + 2 kv_heads) head_dim outputs")
    heads = Append(q_heads, kv_heads, head_dim, str(pages_dtype).removeprefix("torch."), head_norms)
    return (q_heads, kv_heads, head_dim), *_plan(kernel, kind, shape, dtype, device, None, heads)


def _of(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} on {tensor.device}"
