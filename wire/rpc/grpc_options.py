"""Settings that gRPC reads from the environment when it is first imported. This module does not import gRPC."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version

_EXPERIMENTS = "-event_engine_client,-event_engine_listener"
_MEASURED_VERSIONS = ("1.85.",)
"""The gRPC releases with which the undocumented experiments were measured. Other releases might print a warning, so
they keep gRPC's own event loop. Results stay equal, but links between machines are slower (benchmarks/notebook.md)."""


def tune_grpc() -> None:
    """Selects gRPC's faster event loop unless the user has set one. It must be called before gRPC is imported."""
    if "grpc" in sys.modules:
        return
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    if version("grpcio").startswith(_MEASURED_VERSIONS):
        os.environ.setdefault("GRPC_EXPERIMENTS", _EXPERIMENTS)
