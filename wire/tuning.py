"""Settings that the gRPC library takes from the environment only, before its first import. Imports no gRPC."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version

_EXPERIMENTS = "-event_engine_client,-event_engine_listener"
_MEASURED_VERSIONS = ("1.85.",)
"""Releases that know these names: another would print a complaint and go on. Figures: benchmarks/hop.py."""


def tune_grpc() -> bool:
    """Chooses the event loop that answers about twice as fast; for process mains, as early as possible.

    False where it is too late, the user has chosen, or the library is of another version.
    """
    if "grpc" in sys.modules or "GRPC_EXPERIMENTS" in os.environ:
        return False
    if not version("grpcio").startswith(_MEASURED_VERSIONS):
        return False
    os.environ["GRPC_EXPERIMENTS"] = _EXPERIMENTS
    return True
