"""Run each CUDA kernel over small problems: what compute-sanitizer watches in test_sanitizer.py."""

from __future__ import annotations

import torch

from strobe.attention import ladder
from strobe.attention.api import empty_lse
from strobe.attention.cases import CORRECTNESS
from strobe.linear import Projection
from strobe.linear import ladder as linear_ladder
from strobe.ops.activation import swiglu
from strobe.ops.norm import rms_norm
from strobe.ops.softmax import softmax

CASES = {
    "tile_plus_one",
    "odd_causal",
    "more_queries_than_keys_causal",
    "no_keys",
    "several_tiles_causal",
    "softcap_sinks_window",
    "packed_window_sinks",
    "paged_decode",
    "paged_draft",
    "paged_packed",
}


def main() -> None:
    for rung in ladder.RUNGS.values():
        if not rung.name.startswith("cuda_"):
            continue
        ran = 0
        for case in CORRECTNESS:
            if case.name not in CASES:
                continue
            inputs = case.inputs(torch.bfloat16, "cuda")
            problem = inputs.problem
            if rung.refusals(problem):
                continue
            out, lse = torch.empty_like(inputs.q), empty_lse(problem, inputs.q)
            rung.run(problem, inputs.q, inputs.k, inputs.v, out, lse)
            torch.cuda.synchronize()
            ran += 1
        print(f"{rung}: {ran} cases")
    x, weight = torch.randn(3, 1000, device="cuda").half(), torch.randn(130, 1000, device="cuda").half()
    for name in linear_ladder.RUNGS:
        if name.startswith("cuda_"):
            Projection(weight, weight[:, 0].contiguous())(x, kernel=name)
    fused = Projection(weight, weight[:, 0].contiguous(), norm=weight[0].clone(), norm_eps=1e-5, swiglu=True)
    for _ in range(3):
        fused(x, residual=x[:, :65].contiguous(), kernel="cuda_skinny")
    rms_norm(x, weight[0].clone(), 1e-5, kernel="cuda")
    swiglu(x, kernel="cuda")
    softmax(x)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
