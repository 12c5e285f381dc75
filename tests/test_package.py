"""The package as a user gets it: light to import, whole in its wheel, readable in its files."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import strobe

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "src" / "strobe"
HEAVY = {"torch", "triton", "transformers", "tokenizers", "fastapi", "matplotlib", "typer", "rich", "cuda"}
MOST_LINES = 350


def run(code: str, **options: object) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "statement",
    [
        "import strobe",
        "import strobe; strobe.AttentionProblem; strobe.Dense; strobe.Paged; strobe.__version__; dir(strobe)",
        "import strobe.settings, strobe.errors, strobe.device, strobe.attention.ladder",
    ],
)
def test_import_brings_nothing_heavy(statement: str) -> None:
    code = f"import sys; {statement}; print(*{{name.split('.')[0] for name in sys.modules}})"
    assert not HEAVY & set(run(code).split())


def test_command_line_brings_no_torch_before_it_is_needed() -> None:
    code = "import sys, strobe.cli.main; print(*{name.split('.')[0] for name in sys.modules})"
    assert not (HEAVY - {"typer", "rich"}) & set(run(code).split())


@pytest.mark.parametrize("name", strobe.__all__)
def test_public_name_resolves(name: str) -> None:
    assert getattr(strobe, name) is not None
    assert name in dir(strobe)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="atention"):
        strobe.atention  # noqa: B018


@pytest.mark.parametrize("before", ["", "import strobe.attention.problem; "])
def test_attention_is_function_and_package(before: str) -> None:
    code = (
        f"{before}import strobe, torch; q = torch.ones(1, 2, 1, 8); "
        "print(tuple(strobe.attention(q, q, q).shape), strobe.attention.Dense.__name__); "
        "import inspect; print(*list(inspect.signature(strobe.attention).parameters)[:4])"
    )
    assert run(code).splitlines() == ["(1, 2, 1, 8) Dense", "q k v causal"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_is_for_every_platform(wheel: Path) -> None:
    assert wheel.name == f"strobe-{strobe.__version__}-py3-none-any.whl"


def test_wheel_holds_every_source(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        str(path.relative_to(SOURCES.parent))
        for path in SOURCES.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    }
    assert wanted <= held
    assert not [name for name in held if name.startswith("tests") or "__pycache__" in name]


def test_wheel_works_outside_the_repository(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = f"import sys; sys.path.insert(0, {str(site)!r}); import strobe; print(strobe.__file__)"
    assert run(code, cwd=tmp_path) == str(site / "strobe" / "__init__.py")
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r}); from strobe.cli.main import run; "
        "run(['generate', 'O', '--max-tokens', '4', '--json'])"
    )
    assert '"finish_reason"' in run(code, cwd=tmp_path)


def test_files_stay_readable() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in SOURCES.rglob("*.py")
    }
    assert {name: lines for name, lines in lengths.items() if lines > MOST_LINES} == {}
