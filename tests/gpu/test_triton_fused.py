"""triton_fused compiled: each configuration it may choose, and rows beside rows."""

from __future__ import annotations

import pytest
import torch

from strobe.attention.cases import Case
from strobe.attention.check import verdict
from strobe.attention.prefill import triton_fused

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("head_dim", [64, 128])
def test_every_configuration(number: int, head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from strobe.attention.prefill.triton_fused_kernel import attend

    if number >= len(attend.configs):
        pytest.skip(f"there are {len(attend.configs)} configurations")
    monkeypatch.setattr(attend, "configs", attend.configs[number : number + 1])
    monkeypatch.setattr(attend, "cache", {})
    rows = ((130, 130), (1, 200), (0, 9), (300, 300), (64, 3))
    inputs = Case("", rows, head_dim=head_dim, layout="packed", causal=True).inputs(torch.bfloat16, "cuda")
    out = torch.full_like(inputs.q, float("nan"))
    triton_fused.run(inputs.problem, inputs.q, inputs.k, inputs.v, out, None)
    judged = verdict(inputs.problem, inputs.q, inputs.k, inputs.v, out)
    assert judged.right, f"{attend.configs[0]}: {judged}"


def test_nan_beside_a_row_stays_there() -> None:
    inputs = Case("", ((90, 110),) * 3, layout="packed").inputs(torch.bfloat16, "cuda")
    inputs.k[110:220], inputs.v[110:220] = float("nan"), float("nan")
    out = torch.empty_like(inputs.q)
    triton_fused.run(inputs.problem, inputs.q, inputs.k, inputs.v, out, None)
    assert out[90:180].isnan().all()
    assert not out[:90].isnan().any()
    assert not out[180:].isnan().any()
