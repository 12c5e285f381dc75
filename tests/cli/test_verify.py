from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from .conftest import Cli


def test_same_weights_agree(cli: Cli, model_folder: Path) -> None:
    outcome = cli("verify", str(model_folder), "--device", "cpu", "--max-tokens", "16", "--json")
    assert outcome.code == 0
    found = json.loads(outcome.out)
    assert found["logit_difference"] < 1e-4
    assert found["largest_logit"] > 0
    assert found["same_choice"] == found["positions"] > 50
    assert found["greedy_equal"] == found["greedy_tokens"] == 48
    assert found["strobe_tokens_per_s"] > 0
    text = cli("verify", str(model_folder), "--device", "cpu", "--max-tokens", "16").out
    assert "48 of 48" in text
    assert "tok/s" in text


def test_other_weights_are_found_out(cli: Cli, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from strobe.bench import verify

    honest = verify.logits
    monkeypatch.setattr(verify, "logits", lambda *args: honest(*args) + torch.tensor(0.5))
    outcome = cli("verify", str(model_folder), "--device", "cpu", "--max-tokens", "4", "--json")
    assert outcome.code == 1
    assert json.loads(outcome.out)["logit_difference"] == pytest.approx(0.5, abs=1e-3)


def test_format_that_transformers_cannot_read(cli: Cli, tmp_path: Path) -> None:
    assert "is empty" in cli("verify", str(tmp_path)).error
