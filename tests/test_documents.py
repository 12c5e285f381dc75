"""What the documents say is true: their code runs, their verbs and files exist."""

from __future__ import annotations

import re
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.main import get_command

from strobe.attention.api import empty_lse
from strobe.attention.cases import CORRECTNESS
from strobe.attention.check import verdict
from strobe.cli.main import app

ROOT = Path(__file__).parents[1]
DOCUMENTS = ["README.md", "CONTRIBUTING.md"]


def python_blocks(document: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / document).read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("block", python_blocks("README.md"), ids=lambda block: block.splitlines()[0])
def test_readme_code_runs(block: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(block, "README.md", "exec"), {})
    if "print(" in block:
        assert capsys.readouterr().out.strip()


def test_rung_of_the_walkthrough_is_right() -> None:
    (block,) = (block for block in python_blocks("CONTRIBUTING.md") if "IDEA" in block)
    rung = types.ModuleType("torch_halves")
    exec(compile(block, "CONTRIBUTING.md", "exec"), rung.__dict__)
    ran = 0
    for case in CORRECTNESS:
        inputs = case.inputs(torch.float32, seed=torch.seed() % 2**31)
        problem = replace(inputs.problem, return_lse=True)
        if rung.refusals(problem):
            continue
        out, lse = (torch.full_like(t, float("nan")) for t in (inputs.q, empty_lse(problem, inputs.q)))
        rung.run(problem, inputs.q, inputs.k, inputs.v, out, lse)
        found = verdict(problem, inputs.q, inputs.k, inputs.v, out, lse)
        assert found.right, f"{case}: {found}"
        ran += 1
    assert ran > len(CORRECTNESS) / 2


@pytest.mark.parametrize("document", DOCUMENTS)
def test_verbs_and_targets_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    verbs = set(get_command(app).commands)
    assert set(re.findall(r"[`\n]strobe ([a-z]+)", text)) <= verbs
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"[`\n]make ([a-z-]+)", text)) <= targets


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_and_paths_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / link).exists(), link
    for path in re.findall(r"`([\w./-]+/(?:[\w.-]+)?|[\w/-]+\.(?:py|txt|md))`", text):
        homes = (ROOT, ROOT / "src", ROOT / "src" / "strobe")
        assert any((home / path).exists() for home in homes) or path.endswith("torch_halves.py"), path
