"""Keeps the outcomes of steps and packs all results, so that a lost machine takes no result with it."""

from __future__ import annotations

import json
import shutil
import tarfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import cast

from gpu_support.folders import LOCK
from gpu_support.steps import Step
from llamaclust.core.errors import UsageError

_TAIL_LINES = 5
STEPS_FILE, PACKED = "steps.json", "results.tar.gz"


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a step. Exit status 124 means that the time limit was reached."""

    status: int
    seconds: float
    sources: str
    log: str  # Name of the file with the output.
    tail: tuple[str, ...]  # Last lines of the output.

    @property
    def passed(self) -> bool:
        return self.status == 0


class Record:
    def __init__(self, folder: Path, sources: str, out: Path | None = None) -> None:
        """Reads the outcomes in `folder`. Copies them and all other results to `out` after each change."""
        self.folder, self.sources, self._out, self._path = folder, sources, out, folder / STEPS_FILE
        for path in (self._path, _partial(self._path)):
            if path.exists() and not path.is_file():
                raise UsageError(f"{path}: not a regular file; remove it")
        try:
            self._outcomes = _outcomes(self._path.read_bytes()) if self._path.exists() else {}
        except (ValueError, RecursionError):  # RecursionError is raised for thousands of nested brackets.
            raise UsageError(f"{self._path} has no outcomes of steps; remove it to run all steps again") from None

    def outcome(self, step: Step) -> Outcome | None:
        return self._outcomes.get(step.name)

    def next_run(self, step: Step) -> Path:
        """Returns the path of the step's next log and records, without a suffix. No earlier run has the number."""
        numbers = [int(path.name.partition("-")[0]) for path in self.folder.glob("[0-9][0-9][0-9]-*")]
        return self.folder / f"{max(numbers, default=0) + 1:03}-{step.name}"

    def add(self, step: Step, log: Path, status: int, seconds: float) -> Outcome:
        lines = log.read_text(errors="replace").splitlines()
        outcome = Outcome(status, round(seconds, 1), self.sources, log.name, tuple(lines[-_TAIL_LINES:]))
        self._outcomes[step.name] = outcome
        text = json.dumps({name: asdict(one) for name, one in self._outcomes.items()}, indent=2) + "\n"
        _partial(self._path).write_text(text)
        _partial(self._path).replace(self._path)
        self.pack()
        return outcome

    def pack(self) -> None:
        if self._out is None:
            return
        packed, steps = self._out / PACKED, self._out / STEPS_FILE
        with tarfile.open(_partial(packed), "w:gz") as archive:
            archive.add(self.folder, self.folder.name, filter=_packed_once)
        _partial(packed).replace(packed)
        if self._path.exists():
            shutil.copy(self._path, _partial(steps))
            _partial(steps).replace(steps)


def _packed_once(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if Path(member.name).name in (LOCK, PACKED) else member


def _partial(path: Path) -> Path:
    return path.with_suffix(".tmp")


def _outcomes(data: bytes) -> dict[str, Outcome]:
    found = json.loads(data)
    if not isinstance(found, dict) or not all(isinstance(values, dict) for values in found.values()):
        raise ValueError("no objects by names")
    # A record with other keys comes from another version of this program.
    known = {field.name for field in fields(Outcome)}
    return {name: _outcome(**values) for name, values in found.items() if values.keys() == known}


def _outcome(status: object, seconds: object, sources: object, log: object, tail: object) -> Outcome:
    # `isinstance` would accept a bool as a number.
    if type(status) is not int or type(seconds) not in (int, float) or not isinstance(sources, str):
        raise ValueError("of other types")
    if not isinstance(log, str) or not isinstance(tail, list) or not all(isinstance(line, str) for line in tail):
        raise ValueError("no lines")
    return Outcome(status, cast(float, seconds), sources, log, tuple(tail))
