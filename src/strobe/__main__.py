"""`python -m strobe` is the `strobe` command, and `main` is where the installed one starts."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line. Ctrl-C while it is still being imported is as quiet as later."""
    try:
        from strobe.cli.main import run

        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
