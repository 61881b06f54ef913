"""Schemathesis on the served OpenAPI document: no server error, and replies as documented.

Not checked: whether requests that the schemas forbid are refused (unknown fields and nulls are accepted, and named in a
header), and whether all that they allow are accepted (a context that is full, for instance, is not in a schema). Paths
that answer 501 by name are left out.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,"
    "response_schema_conformance"
)
_REFUSED = r"/(cluster|drain|shutdown|lora-adapters|infill|rerank\w*|api/(blobs|push|embed\w*))"
_SCHEMATHESIS = Path(sys.executable).with_name("schemathesis")


def test_the_served_document(api: str) -> None:
    command = [str(_SCHEMATHESIS), "run", f"{api}/openapi.json", "--max-examples=20", "--seed=1"]
    command += ["--request-timeout=60", f"--exclude-path-regex={_REFUSED}", f"--checks={_CHECKS}"]
    made = subprocess.run(command, capture_output=True, text=True, timeout=1500, check=False)
    assert made.returncode == 0, made.stdout[-4000:]
