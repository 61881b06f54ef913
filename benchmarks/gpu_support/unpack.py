"""Unpacks the archive that kit.sh made. Fails if packages are missing or too old, and names them. On the machine with
the GPU, setup.sh runs this program in the tree's top folder, before any package of llamaclust is available."""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import sys
import tarfile
import tomllib
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

_TEST_TOOLS = ("pytest", "hypothesis", "psutil")


def unpack(archive: Path, unpacked: Path) -> None:
    """Keeps what was unpacked from the same archive, with the kernels that were compiled since."""
    kept, digest = unpacked / "archive", hashlib.sha256(archive.read_bytes()).hexdigest()
    if kept.is_file() and kept.read_text() == digest:
        return
    if archive.resolve().is_relative_to(unpacked.resolve()):
        raise SystemExit(f"{archive} would be removed, since {unpacked} is replaced: move the kit to another folder")
    shutil.rmtree(unpacked, ignore_errors=True)
    with tarfile.open(archive) as content:
        # This user owns the files, and others cannot write them. Otherwise the kernels would not be used.
        for member in content.getmembers():
            member.uid, member.gid, member.uname, member.gname = os.getuid(), os.getgid(), "", ""
            member.mode &= 0o755
        content.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.4 and later have it.
        content.extractall(unpacked)
    home, program = unpacked / "home", unpacked / "bin" / "llamaclust"
    home.mkdir()
    (unpacked / "kernels").rename(home / "kernels")
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m llamaclust "$@"\n')
    program.chmod(0o755)
    kept.write_text(digest)


def required(tree: Path) -> Iterator[str]:
    settings = tomllib.loads((tree / "pyproject.toml").read_text())
    yield from settings["project"]["dependencies"]
    yield from settings["project"]["optional-dependencies"]["cuda13"]
    yield from (one for one in settings["dependency-groups"]["test"] if one.startswith(_TEST_TOOLS))


def shortfalls(requirements: Iterable[str], packages: Path) -> Iterator[str]:
    """Yields a line for each requirement that is not met, including the requirements of packages in the kit."""
    travelled = list(distributions(path=[str(packages)]))
    versions = {canonicalize_name(one.name): one.version for one in travelled}
    theirs = (text for one in travelled for text in one.requires or ())
    for wanted in dict.fromkeys(map(Requirement, (*requirements, *theirs))):
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            found = versions.get(canonicalize_name(wanted.name)) or version(wanted.name)
        except PackageNotFoundError:
            found = "none"
        if found == "none" or not wanted.specifier.contains(found, prereleases=True):
            yield f"{wanted} is needed, but {found} is installed; kit.sh adds small packages that it is given by name"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("unpacked", type=Path, help="folder to make")
    given, tree = parser.parse_args(), Path.cwd()
    unpack(Path(__file__).with_name("content.tar.xz"), given.unpacked)
    shutil.copy(given.unpacked / "native" / "_native.abi3.so", tree / "src" / "llamaclust" / "kernels")
    made_by = (given.unpacked / "nvrtc").read_text().strip()
    try:
        found = ".".join(version("nvidia-cuda-nvrtc").split(".")[:2])
    except PackageNotFoundError:
        found = "unknown"
    if found != made_by:
        print(f"kernels are compiled here, which takes minutes: NVRTC is {found}, the kit's {made_by}", file=sys.stderr)
    if lines := list(shortfalls(required(tree), given.unpacked / "packages")):
        raise SystemExit("\n".join(lines))


if __name__ == "__main__":
    main()
