"""`strobe bench serve`: what it counts, against a live server and against answers that are known."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from strobe.bench.serve import Answer, Target, Workload, measure, summary
from strobe.cli.main import run
from strobe.errors import StrobeError
from strobe.server.config import ServerConfig

from .conftest import LiveServer


def cli(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        run(["bench", "serve", *args])
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


def test_rows_against_a_live_server(idle: LiveServer) -> None:
    before = idle.metric("strobe:generation_tokens_total")
    loads = [Workload(rate, 12, (4, 9), (3, 7), seed=5) for rate in (200.0, math.inf)]
    rows = measure(Target(idle.url), loads, objectives={"e2e": 1e-9})
    wanted = sum(output for _, _, output in loads[0].draw())
    for row in rows:
        assert row["checked"]
        assert (row["completed"], row["refused"], row["failed"]) == (12, 0, 0)
        assert row["tok_s"] * row["duration_s"] == pytest.approx(wanted)
        assert row["goodput_req_s"] == 0
        assert 0 < row["ttft_ms_p50"] <= row["ttft_ms_p99"] <= row["e2e_ms_p99"]
    warm_ups = sum(output for _, _, output in loads[0].draw()[:3])
    assert idle.metric("strobe:generation_tokens_total") - before == 2 * wanted + warm_ups


def test_refusals_are_counted_apart(serve) -> None:
    server = serve(ServerConfig(max_queue=2), max_num_seqs=1)
    (row,) = measure(Target(server.url), [Workload(math.inf, 20, (4, 4), (20, 20))])
    assert row["refused"] > 0
    assert row["completed"] + row["refused"] == 20
    assert row["failed"] == 0
    assert row["checked"]


def test_a_summary_is_the_answers_own() -> None:
    rng = np.random.default_rng(4)
    answers = []
    for _ in range(57):
        ttft, tpot = rng.uniform(0.01, 0.5), rng.uniform(0.001, 0.1)
        tokens = int(rng.integers(2, 50))
        answers.append(Answer(tokens, 200, True, ttft, ttft + tpot * (tokens - 1), tokens))
    lost = [Answer(5, 429), Answer(5, 0), Answer(5, 200, False, 0.1, 0.2, 3)]
    row = summary(
        "m", Workload(1.0, 60), [*answers, *lost], 10.0, provider="p", objectives={"ttft": 0.25, "tpot": 0.05}
    )
    assert (row["completed"], row["refused"], row["failed"]) == (57, 1, 2)
    assert not row["checked"]
    for name, values in (
        ("ttft_ms", [1e3 * a.ttft for a in answers]),
        ("tpot_ms", [1e3 * (a.e2e - a.ttft) / (a.tokens - 1) for a in answers]),
        ("e2e_ms", [1e3 * a.e2e for a in answers]),
    ):
        assert row[name] == pytest.approx(np.mean(values))
        for percentile in (50, 90, 99):
            expected = np.percentile(values, percentile, method="inverted_cdf")
            assert row[f"{name}_p{percentile}"] == pytest.approx(expected)
    good = sum(a.ttft <= 0.25 and (a.e2e - a.ttft) / (a.tokens - 1) <= 0.05 for a in answers)
    assert row["goodput_req_s"] == pytest.approx(good / 10)


def test_arrivals_are_open_and_repeat() -> None:
    drawn = Workload(50.0, 4000, seed=3).draw()
    assert drawn == Workload(50.0, 4000, seed=3).draw()
    gaps = np.diff([due for due, _, _ in drawn])
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.1)
    assert gaps.std() == pytest.approx(1 / 50, rel=0.15)
    assert {due for due, _, _ in Workload(math.inf, 9).draw()} == {0.0}


def test_json_figure_and_result_file(idle: LiveServer, capsys, tmp_path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra plots")
    figure, saved = tmp_path / "serve.png", tmp_path / "serve.json"
    code, out, err = cli(
        capsys, "--url", idle.url, "--rate", "100", "--rate", "inf", "--requests", "5", "--prompt", "3", "6",
        "--output", "2", "4", "--goodput", "ttft:5000", "--plot", str(figure), "--save", str(saved), "--json",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert json.loads(out)["bench"] == "serve"
    rows = json.loads(saved.read_text())["rows"]
    assert [row["case"]["rate"] for row in rows] == [100.0, "inf"]
    assert figure.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--rate", "0"], "rate is 0"),
        (["--rate", "fast"], "rate is 'fast'"),
        (["--requests", "0"], "requests is 0"),
        (["--vocab", "3"], "vocab is 3"),
        (["--prompt", "9", "3"], "prompt lengths 9 to 3"),
        (["--goodput", "ttfb:3"], "did you mean 'ttft'?"),
        (["--goodput", "ttft"], "ttft:200"),
        (["--url", "http://127.0.0.1:9"], "is it running?"),
        (["--plot", "x.txt"], "unknown figure format"),
    ],
)
def test_mistakes_are_one_line(capsys, args, told) -> None:
    code, out, err = cli(capsys, *args)
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert told in line


def test_a_server_that_refuses_is_told_of(idle: LiveServer) -> None:
    with pytest.raises(StrobeError, match="no such model"):
        measure(Target(idle.url, model="gpt-17"), [Workload(1.0, 1)])
