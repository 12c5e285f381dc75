"""The product through oneDNN, which compiles AVX-512 code for the machine it runs on.

PyTorch's own choice on x86, MKL, keeps to AVX2 on processors that are not Intel's: on an AMD EPYC of
family 26, one core, float32, 110 GFLOP/s against 240 from 256 tokens on. One or two tokens are bound
by memory, and MKL reads as fast or faster; with three, oneDNN is even, and with four ahead.

oneDNN compiles and keeps a product for every number of tokens that it meets. A server meets them all,
so the number is rounded up to one of eight sizes an octave: at most an eighth of the work is padding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from strobe.linear.problem import LinearProblem
from strobe.linear.projection import Projection

IDEA = "torch.ops.mkldnn: oneDNN, where the vendor's library is not the processor's vendor's"

FEWEST_TOKENS = 3
_TOKENS = 512
"""Of one product. The result of more is memory that the system hands out anew each time: 4,700
prompt tokens of strobe-tiny took 0.27 s in steps of 2048, and 0.20 in these parts."""


def refusals(problem: LinearProblem) -> list[str]:
    reasons = []
    if problem.device != "cpu" or not torch.backends.mkldnn.is_available():
        reasons.append("needs a CPU and a torch built with oneDNN")
    if problem.dtype != "float32":
        reasons.append("float32 only")
    if problem.tokens < FEWEST_TOKENS:
        reasons.append(f"{FEWEST_TOKENS} tokens and up")
    return reasons + [f"fuses no {what}" for what in problem.around if what != "residual"]


def run(problem: LinearProblem, x: torch.Tensor, projection: Projection, out: torch.Tensor) -> None:
    for first in range(0, problem.tokens, _TOKENS):
        part, into = x[first : first + _TOKENS], out[first : first + _TOKENS]
        if (size := rounded(len(part))) > len(part):
            part = F.pad(part, (0, 0, 0, size - len(part)))
        product = torch.ops.mkldnn._linear_pointwise(part, projection.weight, projection.bias, "none", [], "")
        if problem.residual:
            into.add_(product[: len(into)])
        else:
            into.copy_(product[: len(into)])


def rounded(tokens: int) -> int:
    """The next size that products are compiled for: up to 16 every one, then eight sizes an octave."""
    step = 1 << max(0, (tokens - 1).bit_length() - 4)
    return -(-tokens // step) * step
