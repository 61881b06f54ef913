"""The `llamaclust` command: groups its commands and turns errors into one line and an exit code."""

from __future__ import annotations

import os
import sys

import typer

from llamaclust.cli import cluster_commands, generate_commands, measure_commands, model_commands
from llamaclust.errors import LlamaclustError

app = typer.Typer(
    name="llamaclust",
    help="Runs one language model on several machines: the same tokens however the cluster is cut.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
cluster_commands.register(app)
generate_commands.register(app)
measure_commands.register(app)
model_commands.app.command("perplexity")(measure_commands.perplexity)
app.add_typer(model_commands.app, name="model")


def main() -> None:
    """Runs the command line; exits 0 done, 1 failed, 2 bad usage or file, 3 does not fit."""
    try:
        app()
    except LlamaclustError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


if __name__ == "__main__":
    main()
