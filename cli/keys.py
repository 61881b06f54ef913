"""The `keys` commands, which edit the file of API keys."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from llamaclust.cli.options import option_value
from llamaclust.cli.terminal import printable

File = Annotated[
    Path | None,
    Option(
        "--file", metavar="FILE", help="File of API keys, as in `api_keys_file`. Default: api-keys in the state folder."
    ),
]
_AT_ONCE = "running clusters that use this file apply the change at once"


def add(
    name: Annotated[
        str | None, Argument(metavar="NAME", help="Name of the key's owner or purpose. Default: key-1, key-2, ...")
    ] = None,
    file: File = None,
) -> None:
    """Make an API key and print it."""
    from llamaclust.cluster.config.values import parse_name
    from llamaclust.cluster.state.api_keys import add_key

    path = key_file(file)
    added = add_key(path, None if name is None else option_value("NAME", parse_name, name))
    print(added.key)
    print(
        f"key {added.name} is in {path}; {_AT_ONCE}; other clusters need the file as `api_keys_file`", file=sys.stderr
    )


def list_keys(file: File = None) -> None:
    """List the names of API keys, without the keys. The first key has more permissions than the others."""
    from llamaclust.cluster.state.api_keys import named_keys

    path = key_file(file)
    keys = named_keys(path)
    for each in keys:
        print(printable(each.name))
    if not keys:
        print(f"no API keys in {path}; `llamaclust keys add` makes one")


def remove(
    name: Annotated[str, Argument(metavar="NAME", help="Name of the key, as `keys list` shows it.")], file: File = None
) -> None:
    """Remove an API key."""
    from llamaclust.cluster.state.api_keys import remove_key

    path = key_file(file)
    remove_key(path, name)
    print(f"key {name} is removed from {path}; {_AT_ONCE}", file=sys.stderr)


def key_file(given: Path | None = None) -> Path:
    from llamaclust.cluster.config.environment import environment
    from llamaclust.cluster.state.api_keys import FILE_NAME

    return given.expanduser().absolute() if given else environment().state_dir / FILE_NAME
