"""Adapters of LoRA that a model is served with, by numbers that they keep; their record for the next coordinator."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from llamaclust.cluster.state.directory import write_private
from llamaclust.cluster.state.disk_thread import DiskThread
from llamaclust.cluster.state.regular_file import read_json
from llamaclust.core.errors import LlamaclustError
from llamaclust.core.limits import MAX_ADAPTERS

_WRITE_S = 10.0
"""Until a disk is taken for one that hangs."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServedAdapter:
    """An adapter of LoRA, as clients name it. `content`: its digest, if a client loaded it."""

    name: str
    path: str
    scale: float = 1.0  # of requests that name it as their model
    content: str = ""


@dataclass(slots=True, eq=False)
class ServedAdapters:
    """Of one model. An adapter keeps its number while others come and go."""

    first: Sequence[ServedAdapter] = ()  # those of the cluster file, numbered from 0
    _present: dict[int, ServedAdapter] = field(init=False)

    def __post_init__(self) -> None:
        self._present = dict(enumerate(self.first))

    def __iter__(self) -> Iterator[ServedAdapter]:
        return (adapter for _, adapter in self.numbered)

    @property
    def numbered(self) -> list[tuple[int, ServedAdapter]]:
        """In the order of the numbers."""
        return sorted(self._present.items())

    @property
    def loaded(self) -> list[tuple[int, ServedAdapter]]:
        """Those that clients loaded."""
        return [(number, adapter) for number, adapter in self.numbered if adapter.content]

    @property
    def numbers(self) -> tuple[int, ...]:
        return tuple(sorted(self._present))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(adapter.name for adapter in self)

    def number_of(self, name: str | None) -> int | None:
        """None: no adapter has the name."""
        return next((number for number, adapter in self._present.items() if adapter.name == name), None)

    def __getitem__(self, number: int) -> ServedAdapter:
        return self._present[number]

    def add(self, number: int, adapter: ServedAdapter) -> None:
        assert number not in self._present and number < MAX_ADAPTERS
        self._present[number] = adapter

    @property
    def marks(self) -> tuple[str, ...]:
        """What answers may depend on of the adapters that clients loaded: numbers, names and contents."""
        return tuple(f"{number} {adapter.content} {adapter.name}" for number, adapter in self.loaded)

    def contradict(self, marks: Sequence[str]) -> bool:
        """Whether a number or a name of earlier marks is another adapter's now."""
        now = {mark: mark.split(" ", 2) for mark in self.marks}
        for number, _, name in (mark.split(" ", 2) for mark in marks if mark not in now):
            if any(number == other[0] or name == other[2] for other in now.values()):
                return True
        return False


class AdapterRecord:
    """A file of the cluster's folder: adapters that clients loaded, of each model by its name. The event loop does not
    wait for the disk."""

    def __init__(self, path: Path) -> None:
        """What cannot be read is left out, with a warning."""
        self.path = path
        self._models: dict[str, list[tuple[int, ServedAdapter]]] = {}
        try:
            self._models = {name: [*map(_adapter, listed)] for name, listed in read_json(path).items()}
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            _log.warning("%s: cannot be read: %s; adapters that clients loaded are not loaded again", path, error)

    def of(self, model: str) -> list[tuple[int, ServedAdapter]]:
        return self._models.get(model, [])

    async def write(self, model: str, adapters: Sequence[tuple[int, ServedAdapter]]) -> None:
        """On disk when it returns. LlamaclustError where that fails; then the record is as before."""
        models = {**self._models, model: list(adapters)}
        values = {
            name: [
                {"number": number, "name": adapter.name, "path": adapter.path, "content": adapter.content}
                for number, adapter in listed
            ]
            for name, listed in models.items()
            if listed
        }
        disk = DiskThread("adapter record", _WRITE_S)
        try:
            await disk.call(partial(write_private, self.path, json.dumps(values)))
        except TimeoutError as error:
            raise LlamaclustError(f"{self.path}: cannot be written: {error.strerror}") from error
        finally:
            disk.close()
        self._models = models


def _adapter(entry: Any) -> tuple[int, ServedAdapter]:
    number, name, path, content = (entry[key] for key in ("number", "name", "path", "content"))
    if not isinstance(number, int) or not 0 <= number < MAX_ADAPTERS or not all(map(_is_text, (name, path, content))):
        raise ValueError("an adapter without a number, a name, a path or a digest")
    return number, ServedAdapter(name, path, content=content)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)
