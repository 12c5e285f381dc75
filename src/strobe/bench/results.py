"""Result files: one JSON a benchmark, with what is needed to believe it and to repeat it.

`benchmarks/results/<machine>/<bench>.json`; every table and plot is made from these.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from strobe import device as devices
from strobe.errors import StrobeError

Row = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """`rows` hold a `case`, a `provider` ("strobe:<kernel>" or a peer), `checked`, and the figures."""

    bench: str
    rows: list[Row]
    machine: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    commit: str = ""
    when: str = ""

    @classmethod
    def here(
        cls,
        bench: str,
        rows: list[Row],
        *,
        peers: Mapping[str, str] | None = None,
        commit: str | None = None,
        **machine: Any,
    ) -> Result:
        """A result measured now, on this machine, by this checkout; `machine` adds to its facts.

        `peers` are versions of what was measured beside strobe; `commit` names the sources where
        they were copied without their git folder.
        """
        seen = devices.machine()
        facts = {
            "gpu": seen.gpus[0].name if seen.gpus else None,
            "driver": seen.driver,
            "cpu": f"{seen.cpu.name}, {seen.cpu.cores} cores",
            "clocks_mhz": _clocks() if seen.gpus else None,
            "threads": None if seen.gpus else _threads(),
        }
        versions = {name: version for name, version in seen.versions.items() if version}
        return cls(
            bench,
            rows,
            {**{name: fact for name, fact in facts.items() if fact}, **machine},
            {"python": seen.python, **versions, **(peers or {})},
            commit or _commit(),
            datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        )

    @property
    def commits(self) -> str:
        """The commit, and those of rows that say they are another's."""
        return " and ".join(
            dict.fromkeys([self.commit, *(row.get("commit", self.commit) for row in self.rows)])
        )

    def save(self, path: Path) -> None:
        """Write the file whole, or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        rows = ",\n  ".join(json.dumps(row) for row in self.rows)
        head = json.dumps({k: v for k, v in asdict(self).items() if k != "rows"}, indent=1)
        part.write_text(f'{head[:-2]},\n "rows": [\n  {rows}\n ]\n}}\n', encoding="utf-8")
        part.replace(path)

    @classmethod
    def load(cls, path: Path) -> Result:
        """Read one back. Raises StrobeError where the file is not a result."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{name: content[name] for name in cls.__dataclass_fields__})
        except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
            raise StrobeError(f"{path} is no result file: {error}") from error


def default_path(bench: str) -> Path:
    """Where a result of this machine belongs, below the current folder."""
    seen = devices.machine()
    return Path("benchmarks/results") / (seen.gpus[0].slug if seen.gpus else "cpu") / f"{bench}.json"


def _commit() -> str:
    """The checkout's commit, with "+" where it has changes; "" outside a checkout."""
    root = Path(__file__).parent

    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], cwd=root, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + (
            "+" if git("status", "--porcelain", "--", "src") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return ""


def _threads() -> int | None:
    """Threads that torch computes with, where it is in use."""
    torch = sys.modules.get("torch")
    return None if torch is None else torch.get_num_threads()


def _clocks() -> dict[str, int] | None:
    """SM and memory clocks as they are now, MHz."""
    query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader,nounits", "--id=0"]
    try:
        sm, memory = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split(",")
        return {"sm": int(sm), "memory": int(memory)}
    except (OSError, subprocess.CalledProcessError, ValueError):
        return None
