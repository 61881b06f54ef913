"""Settings that gRPC reads from the environment when it is first imported. This module does not import gRPC."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version

_EXPERIMENTS = "-event_engine_client,-event_engine_listener"
_MEASURED_VERSIONS = ("1.85.",)
"""Releases of gRPC in which `_EXPERIMENTS` were measured. Other releases keep gRPC's default event loop."""


def tune_grpc() -> None:
    """Selects gRPC's faster event loop unless the user has set one. Must be called before gRPC is imported."""
    if "grpc" in sys.modules:
        return
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    if version("grpcio").startswith(_MEASURED_VERSIONS):
        os.environ.setdefault("GRPC_EXPERIMENTS", _EXPERIMENTS)
