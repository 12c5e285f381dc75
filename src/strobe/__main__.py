"""`python -m strobe` is the `strobe` command."""

from __future__ import annotations

from strobe.cli.main import run

if __name__ == "__main__":
    run()
