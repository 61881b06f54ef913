"""Lists a served model's LoRA adapters, counts their requests, and records on disk which adapters clients loaded."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import monotonic_ns
from typing import Annotated

from pydantic import AfterValidator, Field, TypeAdapter

from llamaclust.cluster.state.directory import read_as, write_private
from llamaclust.cluster.state.disk_thread import DiskThread
from llamaclust.core.errors import RequestError
from llamaclust.core.limits import MAX_ADAPTERS, AdapterScales

_PAST = 1024
_log = logging.getLogger(__name__)


class AdapterUnloadedError(RequestError):
    http_status = 404
    code = "model_not_found"


@dataclass(frozen=True, slots=True)
class ServedAdapter:
    """A LoRA adapter with the name that clients use for it. `content` is the digest of its file if a client loaded it,
    and "" if the cluster file names it."""

    name: str
    path: str
    scale: float = 1.0  # Scale in requests that name the adapter as their model.
    content: str = ""


def _checked(adapter: ServedAdapter) -> ServedAdapter:
    if not (adapter.name and adapter.path and adapter.content):
        raise ValueError("an adapter has no name, path or digest")
    return adapter


_Loaded = tuple[Annotated[int, Field(ge=0, lt=MAX_ADAPTERS)], Annotated[ServedAdapter, AfterValidator(_checked)]]
_MODELS = TypeAdapter(dict[str, list[_Loaded]])


@dataclass(slots=True, eq=False)
class ServedAdapters:
    """The adapters of a model. An adapter's number does not change when other adapters are added or removed."""

    first: Sequence[ServedAdapter] = ()  # Adapters of the cluster file, numbered from 0.
    # Scales for requests that choose no adapter. They can change, but an admitted request keeps its scales.
    default: AdapterScales = ()
    _present: dict[int, ServedAdapter] = field(init=False)
    # Loading time (monotonic ns) of each adapter that a client loaded, by adapter number.
    _since_ns: dict[int, int] = field(default_factory=dict)
    # Number, name and removal time (ns) of each removed adapter.
    _past: deque[tuple[int, str, int]] = field(default_factory=partial(deque, maxlen=_PAST))
    _uses: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._present = dict(enumerate(self.first))

    def __iter__(self) -> Iterator[ServedAdapter]:
        return (adapter for _, adapter in self.numbered)

    @property
    def numbered(self) -> list[tuple[int, ServedAdapter]]:
        return sorted(self._present.items())

    @property
    def loaded(self) -> list[tuple[int, ServedAdapter]]:
        return [(number, adapter) for number, adapter in self.numbered if adapter.content]

    @property
    def numbers(self) -> tuple[int, ...]:
        return tuple(sorted(self._present))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(adapter.name for adapter in self)

    def number_of(self, name: str | None) -> int | None:
        return next((number for number, adapter in self._present.items() if adapter.name == name), None)

    def __getitem__(self, number: int) -> ServedAdapter:
        return self._present[number]

    def add(self, number: int, adapter: ServedAdapter) -> None:
        assert number not in self._present and number < MAX_ADAPTERS
        self._present[number] = adapter
        self._since_ns[number] = monotonic_ns()

    def remove(self, number: int) -> None:
        assert not self._uses[number]
        self._past.append((number, self._present.pop(number).name, monotonic_ns()))

    def names_at(self, time_ns: int) -> dict[int, str]:
        names = {number: adapter.name for number, adapter in self._present.items()}
        return names | {number: name for number, name, until_ns in reversed(self._past) if time_ns < until_ns}

    # -- requests ------------------------------------------------------------------------------------------------------

    def uses(self, number: int) -> int:
        return self._uses[number]

    def use(self, scales: AdapterScales, received_ns: int) -> None:
        """Counts a request that uses adapters. Raises AdapterUnloadedError if one was unloaded after `received_ns`."""
        for number, _ in scales:
            if number not in self._present or 0 < received_ns < self._since_ns.get(number, 0):
                raise AdapterUnloadedError(f"model: adapter {number} was unloaded; send the request again")
        self._uses.update(number for number, _ in scales)

    def release(self, scales: AdapterScales) -> None:
        self._uses.subtract(number for number, _ in scales)

    def marks(self, numbers: Collection[int]) -> tuple[str, ...]:
        """Returns a text for each adapter in `numbers` that a client loaded: its number, file digest and name."""
        return tuple(
            f"{number} {adapter.content} {adapter.name}" for number, adapter in self.loaded if number in numbers
        )

    def have(self, marks: Sequence[str]) -> bool:
        return {*marks} <= {*self.marks(self.numbers)}


class AdapterRecord:
    """A record on disk of the adapters that clients loaded, including adapters that could not be loaded again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._disk = DiskThread("adapter record")
        self._models: dict[str, list[tuple[int, ServedAdapter]]] = {}
        self._absent: dict[str, list[tuple[int, ServedAdapter]]] = {}
        try:
            self._models = read_as(path, _MODELS)
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            _log.warning("%s: cannot be read: %s; adapters that clients had loaded will not be loaded", path, error)

    def of(self, model: str) -> list[tuple[int, ServedAdapter]]:
        return self._models.get(model, [])

    def keep(self, model: str, number: int, adapter: ServedAdapter) -> None:
        """Keeps the record of an adapter that could not be loaded, until a client removes or replaces it."""
        self._absent.setdefault(model, []).append((number, adapter))

    async def remove(self, model: str, name: str) -> bool:
        """Removes an adapter that `keep` recorded, or returns False. Raises LlamaclustError if writing fails."""
        absent = self._absent.get(model, [])
        left = [(number, adapter) for number, adapter in absent if adapter.name != name]
        if len(left) == len(absent):
            return False
        loaded = [entry for entry in self.of(model) if entry not in absent]
        await self._write(model, loaded, left)
        return True

    async def write(self, model: str, adapters: Sequence[tuple[int, ServedAdapter]]) -> None:
        """Records the loaded adapters of a model. Raises LlamaclustError and keeps the old record if writing fails."""
        names = {adapter.name for _, adapter in adapters}
        absent = [(number, adapter) for number, adapter in self._absent.get(model, []) if adapter.name not in names]
        await self._write(model, adapters, absent)

    async def _write(
        self, model: str, loaded: Sequence[tuple[int, ServedAdapter]], absent: list[tuple[int, ServedAdapter]]
    ) -> None:
        models = {**self._models, model: [*loaded, *absent]}
        text = _MODELS.dump_json({name: listed for name, listed in models.items() if listed}).decode()
        await self._disk.write(self.path, partial(write_private, self.path, text))
        self._models = models
        self._absent[model] = absent
