"""What the documents say is true: their code runs, their verbs and files exist."""

from __future__ import annotations

import re
import types
from copy import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from typer.main import get_command

from strobe.attention import ladder
from strobe.attention.api import empty_lse
from strobe.attention.cases import CORRECTNESS
from strobe.attention.check import verdict
from strobe.bench.verify import logits
from strobe.checkpoints import huggingface_config, load
from strobe.cli.main import app
from strobe.linear import ladder as linear_ladder

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


def test_family_of_the_walkthrough_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for table in ("_LLAMA_LIKE", "_BY_MODEL_TYPE", "_ARCHITECTURES"):
        monkeypatch.setattr(huggingface_config, table, copy(getattr(huggingface_config, table)))
    (block,) = (block for block in python_blocks("CONTRIBUTING.md") if "_LLAMA_LIKE" in block)
    exec(compile(block, "CONTRIBUTING.md", "exec"), vars(huggingface_config))
    huggingface_config._ARCHITECTURES = (*huggingface_config._LLAMA_LIKE, "GPT2LMHeadModel")
    config = transformers.SeedOssConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
    )
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    for weight in theirs.parameters():
        torch.nn.init.normal_(weight, std=0.2)  # biases too, which start at zero
    theirs.save_pretrained(tmp_path)
    prompt = torch.randint(97, (23,))
    given = logits(load(tmp_path, device="cpu").model, prompt.tolist())
    with torch.inference_mode():
        expected = theirs(prompt[None]).logits[0]
    torch.testing.assert_close(given, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_verbs_and_targets_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    verbs = set(get_command(app).commands)
    assert set(re.findall(r"[`\n]strobe ([a-z]+)", text)) <= verbs
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"[`\n]make ([a-z-]+)", text)) <= targets


def test_readme_names_every_verb() -> None:
    text = (ROOT / "README.md").read_text()
    assert set(get_command(app).commands) == set(re.findall(r"^\| `strobe ([a-z]+)", text, re.MULTILINE))


def test_ladder_names_every_rung_in_order() -> None:
    text = (ROOT / "docs" / "ladder.md").read_text()
    for section, rungs in {
        "Prefill": [rung.name for rung in ladder.PREFILL],
        "Decode": [rung.name for rung in ladder.DECODE],
        "Products with the weights": list(linear_ladder.RUNGS),
    }.items():
        _, _, body = text.partition(f"\n## {section}\n")
        written, _, _ = body.partition("<!-- results:")
        assert re.findall(r"^\| `(\w+)` \|", written, re.MULTILINE) == rungs


@pytest.mark.parametrize("document", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.name)
def test_links_of_documents_exist(document: Path) -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
        assert (document.parent / link).exists(), link


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_and_paths_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / link).exists(), link
    for path in re.findall(r"`([\w./-]+/(?:[\w.-]+)?|[\w/-]+\.(?:py|txt|md))`", text):
        homes = (ROOT, ROOT / "src", ROOT / "src" / "strobe")
        made_by_the_reader = path.endswith(("torch_halves.py", "NAME.py"))
        assert made_by_the_reader or any((home / path).exists() for home in homes), path


def test_equations_that_are_cited_are_there() -> None:
    known = set(re.findall(r"^\*\*\((\d+)\)", (ROOT / "docs" / "math.md").read_text(), re.MULTILINE))
    sources = [path for kind in ("py", "cu", "cuh") for path in (ROOT / "src").rglob(f"*.{kind}")]
    cited = set()
    for path in (*sources, *(ROOT / "docs").glob("*.md"), ROOT / "CONTRIBUTING.md"):
        for line in path.read_text().splitlines():
            if "arXiv" not in line or "math.md" in line:  # else an equation of that paper's
                cited |= {
                    n
                    for pair in re.findall(r"\beq(?:\.|uations?) (\d+)(?: (?:to|and) (\d+))?", line)
                    for n in pair
                }
    assert cited - {""} == known
