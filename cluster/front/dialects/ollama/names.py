"""Names of models as Ollama's clients write them: the served one with or without `:latest`, its aliases, and copies."""

from __future__ import annotations

import re
from typing import Final

from llamaclust.cluster.config.values import TAG, tagged
from llamaclust.cluster.front.errors import HttpError
from llamaclust.cluster.front.fields.model_name import ModelNames
from llamaclust.cluster.front.settings import ApiSettings
from llamaclust.core.limits import AdapterScales

MAX_COPIES: Final = 64
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,254}")


class OllamaNames:
    """Copies are names of the served model that clients made; they last as long as this process."""

    def __init__(self, served: str, settings: ApiSettings) -> None:
        self._models = ModelNames(served, settings, any_by_default=True)
        self._served = served
        self._adapters = settings.adapters
        self._aliases = settings.aliases
        self._is_strict = settings.strict_model is True
        self._copies = settings.copies

    @property
    def _fixed(self) -> tuple[str, ...]:
        return (self._served, *self._aliases, *self._adapters.names)

    @property
    def all(self) -> list[str]:
        """With their tags."""
        return [*dict.fromkeys(tagged(name) for name in (*self._fixed, *self._copies))]

    def check(self, name: str) -> None:
        """HttpError 404 where requests must name the served model and this one does not; 400 for an adapter."""
        self._models.check(self._original(name))

    def adapters(self, name: str, default: AdapterScales) -> AdapterScales:
        """What answers of this model are computed with, unless it is an adapter `default`. HttpError 404 as of
        `check`."""
        return self._models.adapters(self._original(name), default=default)

    def shown(self, name: str) -> str:
        """The name of the model in replies."""
        return self._models.shown(self._original(name))

    def _original(self, name: str) -> str:
        """Of a copy; without the tag."""
        plain = self._plain(name)
        return self._served if plain in self._copies and plain not in self._fixed else plain

    def _plain(self, name: str) -> str:
        return name if name in self._fixed else name.removesuffix(TAG)

    def is_known(self, name: str) -> bool:
        """Whether the list of models has a name."""
        return tagged(name) in self.all

    def check_known(self, name: str) -> None:
        """HttpError 404 for a name that the list of models does not have."""
        if not self.is_known(name):
            raise HttpError(404, "model_not_found", f"model {name[:200]!r} not found", param="model")

    def copy(self, source: str, destination: str) -> None:
        """Another name of the served model. HttpError where it is none, where the cluster file decides about names, and
        for adapters: a copy lasts no longer than this process, and an unknown name means the model without adapters."""
        self.check_known(source)
        if not _NAME.fullmatch(destination):
            message = f"{destination[:200]!r} is not a model's name: letters, digits and ._:/@- are"
            raise HttpError(400, "bad_name", message, param="destination")
        for name in map(self._plain, (source, destination)):
            if name in self._adapters.names:
                message = f"{name!r} is an adapter: names of adapters are under adapters in the cluster file"
                raise HttpError(403, "names_are_fixed", message)
        name = destination.removesuffix(TAG)
        if tagged(destination) in self.all:
            return
        if self._is_strict:
            message = f"names are fixed here: add {name!r} to api.aliases in the cluster file"
            raise HttpError(403, "names_are_fixed", message)
        if len(self._copies) >= MAX_COPIES:
            raise HttpError(507, "too_many_names", f"there are {MAX_COPIES} copies already; delete one")
        self._copies.append(name)

    def delete(self, name: str) -> None:
        """A copy. HttpError for the served model and the cluster file's aliases, and for a name that is none."""
        self.check_known(name)
        if name.removesuffix(TAG) not in self._copies:
            message = f"{name[:200]!r} is served: remove it with `llamaclust model rm` once the cluster is stopped"
            raise HttpError(403, "model_in_use", message, param="model")
        self._copies.remove(name.removesuffix(TAG))
