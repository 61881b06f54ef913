"""The entry of the `llamaclust` command, which turns errors into one line and an exit code."""

from __future__ import annotations

import os
import sys
from typing import Any

from llamaclust.cli.interrupts import end_at_once, ends_at_once
from llamaclust.cli.terminal import print_error
from llamaclust.core.errors import InsufficientMemoryError, LlamaclustError
from llamaclust.core.init_process import adopt_orphans
from llamaclust.core.process_settings import collect_rarely, escape_what_locales_lack, open_standard_streams

_INTERRUPTED = 130
"""The exit code after KeyboardInterrupt, equal to typer's exit code."""


def main() -> None:
    """Runs the command. Exit codes: 0 success, 1 failure, 2 bad usage or file, 3 too little memory, 130 interrupted."""
    adopt_orphans()
    open_standard_streams()
    escape_what_locales_lack()
    collect_rarely()
    with ends_at_once():
        from llamaclust.cli.app import app
        from llamaclust.cli.options import BadUsage
    try:
        code = app(standalone_mode=False, prog_name="llamaclust", help_option_names=["--help", "-h"])
        if code == _INTERRUPTED:
            end_at_once(_INTERRUPTED)
        print(end="", flush=True)
        sys.exit(code if isinstance(code, int) else 0)
    except LlamaclustError as error:
        print_error(error)
        sys.exit(error.exit_code)
    except BadUsage as error:
        _explain(error)
        sys.exit(2)
    except KeyboardInterrupt:
        end_at_once(_INTERRUPTED)
    except MemoryError:
        print_error("the system refuses more memory; end other programs, or raise the memory limit of this program")
        sys.exit(InsufficientMemoryError.exit_code)
    except OSError as error:
        _end_output()
        if not isinstance(error, BrokenPipeError):
            print_error(error)
        sys.exit(1)


def _end_output() -> None:
    """Discards buffered output, since the interpreter would write it at exit and might fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _explain(error: Any) -> None:
    words = " ".join(error.format_message().split())
    if words:  # There is no message if help was printed instead.
        command = error.ctx.command_path if error.ctx else "llamaclust"
        print_error(f"{words.rstrip('.')}; see `{command} --help`")


if __name__ == "__main__":
    main()
