"""Schemathesis on Ollama's OpenAPI document, out of a checkout of ollama/ollama: no server error, and replies as
documented. It names one reply for each path, so statuses of errors are not checked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_CHECKS = "not_a_server_error,content_type_conformance,response_schema_conformance"
_REFUSED = r"/api/(push|pull)"
"""Answered by name."""
_SCHEMATHESIS = Path(sys.executable).with_name("schemathesis")


def test_ollamas_document(api: str, checkout: Path) -> None:
    command = [str(_SCHEMATHESIS), "run", str(checkout / "docs" / "openapi.yaml"), f"--url={api}", "--seed=1"]
    command += ["--max-examples=20", "--request-timeout=60", f"--exclude-path-regex={_REFUSED}", f"--checks={_CHECKS}"]
    made = subprocess.run(command, capture_output=True, text=True, timeout=1500, check=False)
    assert made.returncode == 0, made.stdout[-4000:]
