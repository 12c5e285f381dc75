"""docs/serving.md: its flags are the command's, its metrics the server's, and its code runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from typer.main import get_command

from strobe.cli.main import app

from .conftest import LiveServer

TEXT = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()


def section(name: str) -> str:
    return re.split(r"^## ", TEXT.split(f"\n## {name}\n")[1], flags=re.MULTILINE)[0]


def _spellings(param: Any) -> list[str]:
    return [*param.opts, *param.secondary_opts]


def test_flags() -> None:
    rows = [line.split("|")[1] for line in section("Flags").splitlines() if line.startswith("|")]
    told = {flag for row in rows for flag in re.findall(r"`(-[-\w]+)`", row)}
    known = {flag for param in get_command(app).commands["serve"].params for flag in _spellings(param)}
    assert told == known - {"--help", "-h"}


def test_metrics(idle: LiveServer) -> None:
    idle.post("/v1/completions", {"prompt": "O"})
    shown = idle.http().get("/metrics").text
    told = set(re.findall(r"`(strobe:\w+)`", section("Metrics")))
    assert len(told) > 15
    for name in told:
        assert re.search(rf"^{name}(_count|_total)?[ {{]", shown, re.MULTILINE), name
    samples = set(re.findall(r"^# TYPE (strobe:\w+) ", shown, re.MULTILINE))
    aside = {name for name in samples if name.endswith("_created")}
    assert {name.removesuffix("_total") for name in samples - aside} == {
        n.removesuffix("_total") for n in told
    }


def test_code(idle: LiveServer, capsys) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE):
        exec(compile(block.replace("http://127.0.0.1:8000", idle.url), "serving.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_routes(idle: LiveServer) -> None:
    known = {route.path for route in idle.uvicorn.config.app.routes}
    told = set(re.findall(r"(?:GET|POST) (/[\w./]*)`", section("The API")))
    assert told == known - {"/", "/v1/models/{name:path}"}
