"""Checks that tests named in docs/internals/security-tests.md exist, and that nothing is unpickled."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from support.paths import ROOT

pytestmark = pytest.mark.rule

PAGE = (ROOT / "docs/internals/security-tests.md").read_text()


def test_every_test_that_the_page_names_is_there() -> None:
    named = re.findall(r"`((?:\w+/)*test_\w+)::(test_\w+)`", PAGE)
    assert len(named) > 25
    for file, test in named:
        assert re.search(rf"^(async )?def {test}\(", (ROOT / "tests" / f"{file}.py").read_text(), re.M), (file, test)


@pytest.mark.parametrize("folder", ["cli", "tools", "cluster", "worker", "kernels", "model", "wire", "core", "proto"])
def test_nothing_is_unpickled(folder: str) -> None:
    """No code uses pickle, NumPy's object files, shelve, marshal or eval."""
    sources = [path for path in (ROOT / folder).rglob("*.py") if "_pb2" not in path.name]
    assert sources or folder == "proto"
    loaders = "pickle|_pickle|cloudpickle|dill|shelve|marshal|joblib|torch"
    imported = rf"^\s*(import|from)\s+({loaders})\b|import_module\(.({loaders})\b"
    dangerous = re.compile(rf"{imported}|\b({loaders})\.loads?\(|allow_pickle\s*=\s*True|\beval\(", re.MULTILINE)
    found = {str(path): found[0] for path in sources if (found := dangerous.search(path.read_text()))}
    assert found == {}


def test_a_cluster_on_one_machine_does_without_certificates() -> None:
    """Certificates would cost each worker about 13 MiB."""
    program = (
        "import sys, llamaclust.worker.main, llamaclust.cluster.server.serve; sys.exit('cryptography' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
