"""Options that other programs have where a cluster file has keys of workers: refused with how they are written here."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

from llamaclust.cli.help import PlainCommand
from llamaclust.core.errors import UsageError

_KEYS = {
    "--device": "device",
    "-dev": "device",
    "--gpu-layers": "gpu_layers",
    "--n-gpu-layers": "gpu_layers",
    "-ngl": "gpu_layers",
    "--gpu-memory": "gpu_memory",
    "--threads": "threads",
    "-t": "threads",
    "--memory": "memory",
}


class FileCommand(PlainCommand):
    """A command that reads a cluster file."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """UsageError for a worker's option."""
        for word, following in zip_longest(args, args[1:], fillvalue=""):
            option, _, value = word.partition("=")
            if key := _KEYS.get(option):
                told = f"--set workers.0.{key}={value or following or '...'}"
                raise UsageError(f"{option}: is a key of a worker here, `{key}` in the cluster file: {told}")
        rest: list[str] = super().parse_args(ctx, args)
        return rest
