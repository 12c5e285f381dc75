"""A decode step of a small Llama through the GPU's kernels in the emulator, against the CPU's in float32."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from cuda_emulator import emulated_gpu
from small_llama import CONFIG

from strobe.attention.problem import Paged
from strobe.cuda import jit
from strobe.linear import projection
from strobe.models import shapes
from strobe.models.batch import Batch, KvTensors
from strobe.models.network import tensors

PAGE, LENGTHS = 4, (7, 1, 18)


def step(model: object, attention: str, linear: str, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """One token for each row of LENGTHS keys, the token's own included: logits `[rows, vocab]`."""
    pages = 5
    table = torch.arange(len(LENGTHS) * pages, dtype=torch.int32).view(len(LENGTHS), pages)
    positions = torch.tensor(LENGTHS) - 1
    slots = table.gather(1, positions[:, None] // PAGE).squeeze(1) * PAGE + positions % PAGE
    lens = torch.tensor(LENGTHS, dtype=torch.int32)
    layout = Paged(table, lens, max_kv_len=max(LENGTHS), settled=True)
    rows = torch.arange(len(LENGTHS))
    return model(Batch(rows + 11, positions, slots, layout, rows, KvTensors(k, v), attention, linear))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("attention", "kind"),
    [("cuda_paged", {}), ("cuda_cluster", {"qkv_bias": True}), ("cuda_paged", {"qk_norm": True})],
    ids=str,
)
def test_a_decode_step(attention: str, kind: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(len(kind))
    config = replace(CONFIG, **kind)
    exact = shapes.random_model(config, device="cpu", dtype=torch.float32)
    cached = [torch.randn(2, 15, PAGE, 2, 64).bfloat16() for _ in range(2)]

    def gpu_weight(outputs: int, inputs: int, **_: object) -> torch.Tensor:
        return torch.empty(outputs, inputs, dtype=torch.bfloat16)

    with patch.object(projection, "empty_weight", gpu_weight):
        model = shapes.random_model(config, device="cpu", dtype=torch.bfloat16)
    for rounded, wide in zip(tensors(model.weights), tensors(exact.weights), strict=True):
        if wide.ndim == 1:  # norms and biases
            wide.uniform_(0.2, 1.2)
        wide.copy_(rounded.copy_(wide))
    want = step(exact, "torch_grouped", "torch_linear", *(x.float() for x in cached))
    on_gpu = patch.object(model, "device", torch.device("cuda"))
    launched = []
    with on_gpu, emulated_gpu(sm_count=3):
        kernel = jit.kernel
        monkeypatch.setattr(jit, "kernel", lambda *args: launched.append(args[1]) or kernel(*args))
        first, got = (step(model, attention, "cuda_skinny", *(x.clone() for x in cached)) for _ in range(2))
        monkeypatch.undo()
    assert torch.equal(first, got)  # launched in turn, and ahead of their turn
    assert "project" in launched
    assert ("append" in launched) is config.qk_norm  # else the projection to queries, keys and values does it
    assert (got.float() - want).abs().max() <= 0.05 * want.abs().max()
