"""Installs the faults of workers. Python imports this file if its folder is in PYTHONPATH."""

import sys

if not {"llamaclust.worker", "worker"}.isdisjoint(sys.orig_argv):
    from llamaclust.tools.chaos.worker_faults import install

    install()
