"""What a product with a weight asks for. Imports no torch: a problem can be explained on any machine."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Append:
    """The outputs are heads: queries, then keys, then values. Queries and keys are rotated (ops/rope.py),
    keys and values go to a paged cache, and the result is the queries.

    `head_norms`: each query's and key's head goes through an RMSNorm of its own before it is rotated.
    """

    q_heads: int
    kv_heads: int
    head_dim: int
    kv_dtype: str
    head_norms: bool = False


@dataclass(frozen=True)
class LinearProblem:
    """`x [tokens, inputs] @ weight [outputs, inputs]ᵀ (+ bias [outputs])`, all in one dtype.

    With `norm`, x goes through RMSNorm first. With `swiglu`, the first half of the outputs are gates of
    the second: the result is `silu(gate) * up`. With `residual`, the result is added to what `out`
    holds. With `append` neither of both: see there. x, bias and out are contiguous.
    """

    tokens: int
    inputs: int
    outputs: int
    dtype: str
    bias: bool = False
    norm: bool = False
    swiglu: bool = False
    residual: bool = False
    append: Append | None = None
    device: str = "cpu"
    arch: int = 0
    """Compute capability times ten (90 for an H100 or H200), 0 without a GPU."""
    input_major: bool = False
    """Whether the weight lies input by input: `weight.t()` is contiguous. Else the weight is."""
    narrow: bool = False
    """Whether bfloat16 holds each number of a float32 weight, which is to be kept so beside itself."""

    @property
    def columns(self) -> int:
        """Of the result: `[tokens, columns]`."""
        if self.append is not None:
            return self.append.q_heads * self.append.head_dim
        return self.outputs // 2 if self.swiglu else self.outputs

    @property
    def plain(self) -> LinearProblem:
        """The product alone, with its bias."""
        return replace(self, norm=False, swiglu=False, residual=False, append=None)

    @property
    def around(self) -> list[str]:
        """What stands before and behind the product, by name."""
        return [name for name in ("norm", "swiglu", "residual", "append") if getattr(self, name)]

    def __str__(self) -> str:
        bias = ["bias"] if self.bias else []
        shape = f"[{self.tokens}, {self.inputs}] @ [{self.outputs}, {self.inputs}]ᵀ"
        return f"linear {' + '.join([shape, *bias, *self.around])}, {self.dtype} on {self.device}"
