"""Run triton_fused in Triton's interpreter over the cases named in argv; print {case: verdict} as JSON.

A program of its own, because TRITON_INTERPRET must be set before anything imports triton.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

import torch
from triton.runtime import interpreter

from strobe.attention.api import attention
from strobe.attention.cases import CORRECTNESS, Case, Inputs
from strobe.attention.check import verdict
from strobe.attention.prefill import triton_fused


def allow_new_numpy() -> None:
    """Triton 3.6's interpreter takes int() of arrays of one element, which NumPy 2.4 allows no more."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


def judge(inputs: Inputs) -> dict[str, Any]:
    problem = inputs.problem
    if reasons := triton_fused.refusals(problem):
        return {"right": False, "why": f"refused: {reasons}"}
    given = inputs.q, inputs.k, inputs.v
    out, lse = attention(*given, **inputs.options, kernel="triton_fused", return_lse=True)
    judged = verdict(problem, inputs.q, inputs.k, inputs.v, out, lse)
    return {"right": judged.right, "why": str(judged)}


def nan_in_the_next_row() -> dict[str, Any]:
    """Tiles reach past a row's end into the next row, whose values must not matter."""
    inputs = Case("", ((40, 50),) * 2, head_dim=32).inputs(torch.float16)
    inputs.k[1], inputs.v[1] = float("nan"), float("nan")
    out = torch.empty_like(inputs.q)
    triton_fused.run(inputs.problem, inputs.q, inputs.k, inputs.v, out, None)
    first = Inputs(inputs.q[:1], inputs.k[:1], inputs.v[:1], inputs.options)
    judged = verdict(first.problem, first.q, first.k, first.v, out[:1])
    return {"right": judged.right and bool(out[1].isnan().all()), "why": str(judged)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    allow_new_numpy()
    cases = {case.name: replace(case, head_dim=32) for case in CORRECTNESS}
    verdicts = {name: judge(cases[name].inputs(torch.float16)) for name in sys.argv[1:]}
    json.dump({**verdicts, "nan_in_the_next_row": nan_in_the_next_row()}, sys.stdout)
