"""The `strobe` command: its verbs, and the one place where an error becomes a line and an exit code."""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from strobe import __version__, settings
from strobe.cli import bench, cache, chat, console, env, explain, generate, ladder, serve, verify
from strobe.errors import StrobeError, did_you_mean

app = typer.Typer(
    name="strobe",
    help="Exact attention, from the formula to the fastest kernel, and an LLM engine that stands on it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("serve")(serve.serve)
app.command("verify")(verify.verify)
app.command("explain")(explain.explain)
app.command("env")(env.env)
app.command("ladder")(ladder.ladder)
app.add_typer(bench.app, name="bench")
app.add_typer(cache.app, name="cache")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"strobe {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Settings are checked before any verb runs, so that a misspelt one is not passed over."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("strobe").setLevel(settings.load().log_level.upper())


def run(args: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0 when it did its work, 2 with one line on stderr when it could not.

    130 after Ctrl-C, 1 where the reader of the output has gone (as under `| head`).
    """
    closed = sys.stdout is None
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # None where the shell closed it
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - for the life of the process
    if closed:
        sys.exit(_fail("stdout is closed (hint: >/dev/null throws the output away)"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character shows "?"
    warnings.showwarning = _warn
    try:
        code = app(args, prog_name="strobe", standalone_mode=False)
        sys.stdout.flush()
    except StrobeError as error:
        code = _fail(str(error))
    except typer.TyperException as error:
        code = _fail(_usage(error)) if error.format_message() else 2  # without a verb the help is printed
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        _drop_stdout()
        code = 1
    except OSError as error:
        code = _fail(
            f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error)
        )
        if error.errno == errno.ENOSPC:
            _drop_stdout()
    except MemoryError:
        code = _fail("out of memory")
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        code = _fail(
            "out of memory (hint: a smaller shape; for the engine --kv-cache-gib N, --dtype bfloat16)"
        )
    sys.exit(code or 0)


def _drop_stdout() -> None:
    """Python flushes stdout once more as it exits: give it something that takes the rest."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str) -> int:
    console.error(" ".join(message.split()))
    return 2


def _usage(error: typer.TyperException) -> str:
    """A mistyped command line as one line, with the nearest flag where there is one."""
    message, hint = error.format_message(), None
    context = getattr(error, "ctx", None)
    if context is not None:
        hint = f"{context.command_path} --help"
        flag = getattr(error, "option_name", None)
        if flag is not None and message.startswith("No such option"):
            known = [known for param in context.command.params for known in param.opts]
            message, hint = error.message, did_you_mean(flag, known) or hint
        elif message.startswith("No such command"):
            message, _, meant = message.partition(" Did you mean ")
            hint = f"did you mean {meant}" if meant else hint
    return f"{message[:1].lower()}{message[1:].rstrip('.')}" + (f" (hint: {hint})" if hint else "")


def _is_out_of_memory(error: RuntimeError) -> bool:
    """torch has a class of its own for a GPU's memory, none for a CPU's."""
    torch = sys.modules.get("torch")
    on_gpu = torch is not None and isinstance(error, torch.OutOfMemoryError)
    return on_gpu or "DefaultCPUAllocator" in str(error)


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    console.note(f"warning: {' '.join(str(message).split())}")
