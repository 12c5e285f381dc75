"""What a product with a weight asks for. Imports no torch: a problem can be explained on any machine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LinearProblem:
    """`x [tokens, inputs] @ weight [outputs, inputs]ᵀ (+ bias [outputs])`, all in one dtype.

    x and bias are contiguous; the weight is laid out as `linear.empty_weight` does for its device.
    """

    tokens: int
    inputs: int
    outputs: int
    dtype: str
    bias: bool = False
    device: str = "cpu"
    arch: int = 0
    """Compute capability times ten (90 for an H100 or H200), 0 without a GPU."""

    def __str__(self) -> str:
        bias = " + bias" if self.bias else ""
        shape = f"[{self.tokens}, {self.inputs}] @ [{self.outputs}, {self.inputs}]ᵀ"
        return f"linear {shape}{bias}, {self.dtype} on {self.device}"
