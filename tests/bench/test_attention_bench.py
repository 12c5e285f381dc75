"""The attention bench: rows are checked and complete, refusals are kept apart, results survive the disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from strobe.attention import ladder
from strobe.attention.cases import Case, prefill_shape
from strobe.bench import ceilings, document, peers, plots, tables
from strobe.bench.attention import Provider, measure_all, of_rung
from strobe.bench.linear import measure_all as measure_linear
from strobe.bench.results import Result
from strobe.errors import KernelRefusedError, StrobeError

SMALL = prefill_shape(1, 40, 4, 2, 32, True)


def measure(cases: list[Case], *names: str) -> list[dict]:
    providers = [of_rung(ladder.find(name, "prefill")) for name in names]
    return list(measure_all(cases, providers, "float32", "cpu", budget_ms=1))


def test_rows_hold_the_figures() -> None:
    (row,) = measure([SMALL], "torch_naive")
    assert row["checked"]
    assert row["provider"] == "strobe:torch_naive"
    assert row["ms_min"] <= row["ms"] <= row["ms_max"]
    flops = 4 * (40 * 41 // 2) * 4 * 32
    assert row["tflops"] == pytest.approx(flops / row["ms"] * 1e-9)
    assert row["case"] == {
        "batch": 1, "q_len": 40, "kv_len": 40, "q_heads": 4, "kv_heads": 2, "head_dim": 32,
        "causal": True, "dtype": "float32",
    }  # fmt: skip


def test_a_cpu_has_no_graphs_to_replay() -> None:
    providers = [of_rung(ladder.find("torch_naive", "prefill"))]
    (row,) = measure_all([SMALL], providers, "float32", "cpu", replay=True, budget_ms=1)
    assert row["checked"]
    assert row["ms"] > 0


def test_a_wrong_kernel_has_no_speed() -> None:
    wrong = Provider("strobe:wrong", lambda _: [], lambda inputs: lambda: torch.zeros_like(inputs.q))
    (row,) = measure_all([SMALL], [wrong], "float32", "cpu", budget_ms=1)
    assert not row["checked"]
    assert "ms" not in row


def test_a_peer_that_fails_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    def fails(inputs: object) -> Callable[[], torch.Tensor]:
        raise RuntimeError("no such shape")

    ours = of_rung(ladder.find("torch_naive", "prefill"))
    (row,) = measure_all(
        [SMALL], [Provider("peer", lambda _: [], fails), ours], "float32", "cpu", budget_ms=1
    )
    assert row["provider"] == "strobe:torch_naive"
    assert "peer failed and is left out: no such shape" in caplog.text
    with pytest.raises(RuntimeError, match="no such shape"):
        list(measure_all([SMALL], [Provider("strobe:ours", lambda _: [], fails)], "float32", "cpu"))


def test_without_a_budget_answers_are_checked_and_nothing_is_timed() -> None:
    providers = [of_rung(ladder.find("torch_naive", "prefill"))]
    (row,) = measure_all([SMALL], providers, "float32", "cpu", budget_ms=None)
    assert row["checked"]
    assert "ms" not in row


def test_refusals_are_left_out_or_raised() -> None:
    providers = [of_rung(ladder.find("cuda_split", "prefill"))]
    assert list(measure_all([SMALL], providers, "float32", "cpu")) == []
    with pytest.raises(KernelRefusedError, match="strobe:cuda_split refuses"):
        list(measure_all([SMALL], providers, "float32", "cpu", strict=True))


def test_tile_sizes_are_checked_by_name() -> None:
    with pytest.raises(KernelRefusedError, match="cuda_fused_warp has no tile size z; it has: q, k"):
        of_rung(ladder.find("cuda_fused_warp", "prefill"), {"z": 3})


def test_peers_answer_to_their_backends_names() -> None:
    assert [peer.name for peer in peers.named(["sdpa-flash", "fa3", "sdpa-cudnn"])] == ["fa2", "fa3", "cudnn"]


@pytest.mark.parametrize(("dtype", "fastest"), [("float16", "float32"), ("float64", "float64")])
def test_a_cpu_s_ceiling_is_that_of_the_product_that_kernels_may_stand_on(
    monkeypatch: pytest.MonkeyPatch, dtype: str, fastest: str
) -> None:
    timed = []

    def fake(call: Callable[[], torch.Tensor], device: str) -> float:
        timed.append(call())
        return {torch.float16: 100.0, torch.float32: 2.0, torch.float64: 8.0}[timed[-1].dtype]

    monkeypatch.setattr(ceilings, "_fastest_ms", fake)
    ceilings.ceilings.__wrapped__("cpu", dtype)
    *_, product, _ = timed  # the last is what was read
    assert (product.dtype, product.shape) == (getattr(torch, fastest), (1024, 1024))


def test_linear_rows_are_checked() -> None:
    rows = list(measure_linear([(1, 64, 48), (5, 64, 48)], "float32", "cpu"))
    assert rows
    assert all(row["checked"] for row in rows)
    assert {row["case"]["tokens"] for row in rows} == {1, 5}


def test_results_survive_the_disk(tmp_path: Path) -> None:
    result = Result.here("prefill", measure([SMALL], "torch_naive"), ceilings={"matmul_tflops": 1.0})
    result.save(tmp_path / "deep" / "x.json")
    assert Result.load(tmp_path / "deep" / "x.json") == result
    (tmp_path / "y.json").write_text('{"bench": "prefill"}')
    with pytest.raises(StrobeError, match=r"y\.json is no result file"):
        Result.load(tmp_path / "y.json")


def test_documents_follow_their_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = measure([SMALL, prefill_shape(1, 50, 4, 2, 32, True)], "torch_naive", "torch_online")
    result = Result.here("memory", rows, commit="abc")
    result.save(tmp_path / "benchmarks/results/gpu/memory.json")
    (tmp_path / "README.md").write_text("before\n<!-- results: gpu/memory -->\nold\n<!-- end -->\nafter\n")
    assert document.main(["--check"]) == 1
    assert "old" in (tmp_path / "README.md").read_text()
    assert document.main([]) == 0
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "torch_naive" in text
    assert "old" not in text
    assert document.main(["--check"]) == 0
    (tmp_path / "README.md").write_text("<!-- results: gpu/nothing -->\n<!-- end -->")
    with pytest.raises(StrobeError, match="unknown table 'nothing'"):
        document.main([])


def test_figures_follow_their_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("no tables")
    folder = tmp_path / "benchmarks/results/gpu"
    ceilings = {"dtype": "float32", "matmul_tflops": 1.0, "read_gbps": 100.0}
    rows = measure([SMALL], "torch_naive")
    Result.here("roofline", rows, commit="abc", ceilings=ceilings).save(folder / "roofline.json")
    assert document.main(["--check"]) == 1
    assert not (folder / "roofline.svg").exists()
    assert document.main([]) == 0
    assert document.main(["--check"]) == 0
    drawn = (folder / "roofline.svg").read_bytes()
    (folder / "roofline.svg").unlink()
    assert document.main([]) == 0
    assert (folder / "roofline.svg").read_bytes() == drawn
    Result.here("roofline", rows, commit="def", ceilings=ceilings).save(folder / "roofline.json")
    assert document.main(["--check"]) == 1


def test_tables_mark_the_best_and_the_wrong() -> None:
    case = {"batch": 1, "q_len": 8, "kv_len": 8, "q_heads": 2, "kv_heads": 1, "head_dim": 4, "causal": True}
    rows = [
        {"case": case, "provider": "strobe:a", "checked": True, "tflops": 2.0},
        {"case": case, "provider": "peer", "checked": True, "tflops": 1.0},
        {"case": case, "provider": "bad", "checked": False},
    ]
    table = tables.by_provider(rows, tables.speed("tflops"), best="tflops").splitlines()
    assert [cell.strip() for cell in table[0].split("|")] == ["", "", "a", "peer", "bad", ""]
    assert [cell.strip() for cell in table[2].split("|")][2:5] == ["**2**", "1", "WRONG"]


@pytest.mark.parametrize("suffix", plots.FORMATS)
def test_figures_are_written(tmp_path: Path, suffix: str) -> None:
    rows = measure([prefill_shape(1, n, 4, 2, 32, True) for n in (8, 16)], "torch_naive", "torch_online")
    lines, roof = tmp_path / f"lines{suffix}", tmp_path / f"roof{suffix}"
    plots.against_length(rows, lines, "title")
    ceilings = {"dtype": "float32", "matmul_tflops": 1.0, "read_gbps": 100.0}
    result = Result.here("roofline", rows, ceilings=ceilings)
    plots.roofline(result, roof)
    assert lines.stat().st_size > 1000
    assert roof.stat().st_size > 1000
    with pytest.raises(StrobeError, match="unknown figure format"):
        plots.check_path(tmp_path / "x.jpeg2")
