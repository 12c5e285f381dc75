"""The engine's ladder: tokens are compared before anything is timed; what is wrong has no speed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from strobe.attention import ladder as attention_ladder
from strobe.bench import answers, document, subject
from strobe.bench.engine_ladder import ON_CPU, ON_GPU, Configuration, measure
from strobe.bench.results import Result
from strobe.errors import DeviceError, SettingsError, StrobeError
from strobe.linear import ladder as linear_ladder
from strobe.models import shapes
from strobe.models.network import Model

SMALL = replace(
    shapes.SHAPES["llama3.2-1b"], layers=2, hidden=64, intermediate=96, q_heads=4, kv_heads=2, head_dim=16,
    vocab_size=200, max_position=64,
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Model:
    return shapes.random_model(SMALL, device="cpu", dtype=torch.float32, seed=torch.seed() % 2**31)


def test_rows_are_compared_then_timed(model: Model) -> None:
    rows = list(measure(model, "small", ON_CPU, prompt=11, output=6, runs=2))
    assert [row["provider"] for row in rows] == [f"strobe:{c.name}" for c in ON_CPU]
    for row in rows:
        assert row["checked"] is True
        assert row["case"] == {
            "model": "small", "weights": "random", "batch": 1, "prompt": 11, "output": 6, "dtype": "float32",
        }  # fmt: skip
        assert row["runs"] == 2
        assert row["tok_s"] == pytest.approx(1e3 / row["tpot_ms"])


def test_kernels_that_need_a_gpu_are_refused_by_name(model: Model) -> None:
    rows = list(measure(model, "small", ON_GPU, prompt=5, output=2, runs=1))
    for row, kernel in zip(rows[:3], ("cuda_matmul_naive",) * 3, strict=True):
        assert f"{kernel!r} refuses" in row["refused"]
        assert "needs an NVIDIA GPU" in row["refused"]
        assert "tok_s" not in row
    assert rows[3]["checked"] is True  # cuBLAS's place is taken by this machine's own library


def test_a_wrong_kernel_has_no_speed(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    from strobe.attention.prefill import torch_online

    right = torch_online.run

    def wrong(problem, q, k, v, out, lse) -> None:
        right(problem, q, k, v, out, lse)
        out.mul_(-1)

    monkeypatch.setattr(torch_online, "run", wrong)
    (row,) = measure(
        model, "small", [Configuration("x", "torch_online", "torch_linear")], output=20, prompt=9
    )
    assert row["checked"] is False
    assert 0 <= row["first_wrong"] < 20
    assert "tok_s" not in row


def test_a_tie_is_no_mistake() -> None:
    model = shapes.random_model(SMALL, device="cpu", dtype=torch.float32)
    prompt = torch.randint(200, (7,)).tolist()
    told = answers.logits(model, prompt)[-1]
    best = int(told.argmax())
    assert answers.first_wrong(model, prompt, [best]) is None
    assert answers.first_wrong(model, prompt, [int(told.argmin())]) == 0
    after = answers.logits(model, [*prompt, best])[-1]
    assert answers.first_wrong(model, prompt, [best, int(after.argmin())]) == 1
    model.weights.head.weight.zero_()  # every token as likely as every other
    assert answers.first_wrong(model, prompt, [5, 0, 199]) is None


@pytest.mark.parametrize("configuration", [*ON_GPU, *ON_CPU], ids=lambda c: c.name)
def test_configurations_name_kernels_that_exist(configuration: Configuration) -> None:
    assert linear_ladder.named(configuration.linear_kernel)
    if configuration.attention_kernel != "auto":
        attention_ladder.find(configuration.attention_kernel, "decode")


def test_mistakes_are_refused(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match="max_model_len is 70; the model's context is 64"):
        list(measure(model, "small", ON_CPU, prompt=60, output=10))
    with pytest.raises(StrobeError, match="prompt 0, output 5"):
        list(measure(model, "small", ON_CPU, prompt=0, output=5))
    monkeypatch.setattr(subject, "free_memory", lambda device: 2 << 30)
    with pytest.raises(DeviceError, match=r"llama2-7b takes 12\.6 GiB in bfloat16; 2\.0 GiB are free on cpu"):
        subject.random_model("llama2-7b", "cpu", torch.bfloat16)


def test_table_shows_speeds_refusals_and_mistakes(model: Model) -> None:
    rows = list(measure(model, "small", [ON_CPU[0], ON_GPU[0], ON_CPU[2]], prompt=5, output=3, runs=1))
    rows.append({**rows[0], "provider": "strobe:bad", "checked": False, "first_wrong": 2})
    del rows[-1]["tok_s"]
    _, make = document.TABLES["engine_ladder"]
    table = make(Result("engine_ladder", rows))
    assert table.startswith("small (random weights), one request, prompt 5, output 3, float32:\n")
    naive, refused, fused, bad = table.splitlines()[4:]
    assert f"{rows[0]['tok_s']:.4g}" in naive
    assert "refused" in refused
    assert f"{rows[2]['tok_s'] / rows[0]['tok_s']:.2f}" in fused
    assert "WRONG" in bad
