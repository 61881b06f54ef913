"""Loads compiled code of generated dataclass methods from a file, which saves a fifth of a command's import time.

Python imports this module in processes that tests start with its folder in PYTHONPATH. Pytest's own processes write the
file after they have imported all tests. Its keys are the generated texts, so the code is the same as without it."""

from __future__ import annotations

import builtins
import dataclasses
import marshal
import os
import sys
from types import CodeType
from typing import Any

FOLDER = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120  this process may need no pathlib
_FILE = os.path.join(FOLDER, *4 * [".."], "build", f"dataclasses-{sys.implementation.cache_tag}")  # noqa: PTH118


class GeneratedCode:
    """A cache of compiled code of functions that `dataclasses` generates."""

    def __init__(self) -> None:
        self._compiled: dict[str, CodeType | bytes] = {}
        self._is_new = False
        try:
            with open(_FILE, "rb") as file:  # noqa: PTH123
                self._compiled = marshal.load(file)
        except FileNotFoundError:
            pass  # not written yet
        vars(dataclasses)["exec"] = self._run

    def _run(self, text: str, variables: dict[str, Any] | None, names: dict[str, Any] | None) -> None:
        code = self._compiled.get(text)
        if isinstance(code, bytes):
            code = marshal.loads(code)
        elif code is None:
            code = compile(text, "<string>", "exec")
            if variables is not None and variables.get("__name__", "").startswith("llamaclust."):
                self._compiled[text], self._is_new = code, True
        builtins.exec(code, variables, names)

    def save(self) -> None:
        """Writes the file for other processes if there is new code."""
        if not self._is_new:
            return
        data = {text: code if isinstance(code, bytes) else marshal.dumps(code) for text, code in self._compiled.items()}
        part = f"{_FILE}.{os.getpid()}"
        os.makedirs(os.path.dirname(_FILE), exist_ok=True)  # noqa: PTH103, PTH120
        with open(part, "wb") as file:  # noqa: PTH123
            marshal.dump(data, file)
        os.replace(part, _FILE)  # noqa: PTH105
        self._is_new = False


if __name__ == "sitecustomize" and any("llamaclust" in word for word in sys.orig_argv[1:]):
    GeneratedCode()
    if "PYTHON_WORKER_PROGRAM" in os.environ:  # support.clusters.forking.fork_server.WORKER_PROGRAM
        import runpy

        runpy.run_path(os.environ["PYTHON_WORKER_PROGRAM"])
