"""Run decode/triton_split in Triton's interpreter over the paged cases; print {case: verdict} as JSON.

A program of its own, because TRITON_INTERPRET must be set before anything imports triton.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import torch
from interpreted import allow_new_numpy

from strobe.attention.api import attention
from strobe.attention.cases import CORRECTNESS, Case
from strobe.attention.check import verdict
from strobe.attention.decode import triton_split


def judge(case: Case) -> dict[str, object] | None:
    inputs = case.inputs(torch.float16)
    problem = inputs.problem
    if triton_split.refusals(problem):
        return None
    given = inputs.q, inputs.k, inputs.v
    out, lse = attention(*given, **inputs.options, kernel="decode/triton_split", return_lse=True)
    judged = verdict(problem, inputs.q, inputs.k, inputs.v, out, lse)
    return {"right": judged.right, "why": str(judged)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    allow_new_numpy()
    verdicts = {case.name: judge(replace(case, head_dim=64)) for case in CORRECTNESS}
    json.dump({name: each for name, each in verdicts.items() if each is not None}, sys.stdout)
