"""The C++ compiler that libraries of benchmarks are built with."""

from __future__ import annotations

import os
import shutil


def compiler() -> str | None:
    """Returns the command of $CXX, g++ or clang++, whichever is there first; none if there is none."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))), None)
