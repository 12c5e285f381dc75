"""Run one CUDA rung of attention over its part of the case table: what compute-sanitizer watches.

python tests/gpu/sanitized.py prefill/cuda_async 0/4 all      # the first of four parts of all cases
python tests/gpu/sanitized.py decode/cuda_paged 0/1 few
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch

from strobe.attention import ladder
from strobe.attention.api import empty_lse
from strobe.attention.cases import CORRECTNESS, Case

FEW = {
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


def rungs() -> list[str]:
    """The CUDA rungs, by their full names."""
    return [name for name, rung in ladder.RUNGS.items() if rung.name.startswith("cuda_")]


def cases(part: int, parts: int, which: str) -> list[Case]:
    """Every `parts`-th case; head_dim 64 and 128 in turn."""
    chosen = [case for case in CORRECTNESS if which == "all" or case.name in FEW]
    dims = (64, 128)
    return [replace(case, head_dim=dims[i % 2]) for i, case in enumerate(chosen) if i % parts == part]


def main(name: str, part: str, which: str) -> None:
    rung, ran = ladder.RUNGS[name], 0
    index, _, parts = part.partition("/")
    for case in cases(int(index), int(parts), which):
        inputs = case.inputs(torch.bfloat16, "cuda")
        problem = inputs.problem
        if rung.refusals(problem):
            continue
        out, lse = torch.empty_like(inputs.q), empty_lse(problem, inputs.q)
        rung.run(problem, inputs.q, inputs.k, inputs.v, out, lse)
        torch.cuda.synchronize()
        ran += 1
    print(f"{rung}: {ran} cases")


if __name__ == "__main__":
    main(*sys.argv[1:])
