"""The command line: `main` and its exit codes. Beside `fedlm.api` only it may import the other packages.

A verb imports what it needs when it runs, so `fedlm --help` costs no torch, flwr or ray. Standard output has
the result alone, with `--json` one object in which NaN and infinities are null; the rest is standard error's.

    0    done
    1    failed; an error that fedlm did not foresee keeps its traceback
    2    wrong usage, configuration or data
    3    the privacy budget would be exceeded
    130  interrupted, by Ctrl-C or SIGTERM
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from fedlm.environment import set_quiet_environment
from fedlm.errors import FedlmError
from fedlm.plugins import refuse_shadows, search_in


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Arguments:
        argv: The words after `fedlm`; None means those of this process, none at all means `--help`.

    Returns:
        The exit code.
    """
    set_quiet_environment()
    words = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        refuse_shadows()
        search_in([Path()])
        code = _dispatch(words)
        sys.stdout.flush()
        return code
    except FedlmError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        return 1


def _dispatch(words: list[str]) -> int:
    import click
    from typer.main import get_command

    from fedlm.cli.app import app

    command = get_command(app)
    try:
        with command.make_context("fedlm", words) as context:
            command.invoke(context)
    except click.exceptions.Exit as leave:
        return leave.exit_code
    except click.ClickException as error:
        path = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "fedlm"
        return _fail(f"{error.format_message().rstrip('.')}; see `{path} --help`", error.exit_code)
    return 0


def _fail(message: str, code: int) -> int:
    print(f"fedlm: error: {' '.join(message.split())}", file=sys.stderr)
    return code


def _reader_is_gone() -> bool:
    """Whether standard output is the broken pipe (`fedlm config show | head -1`); if so, silence it."""
    try:
        print(flush=True)  # a flush alone has nothing left to say when Python runs unbuffered
    except BrokenPipeError:
        # The interpreter flushes once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False
