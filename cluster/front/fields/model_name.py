"""The field `model`: which names of models and adapters a request may have."""

from __future__ import annotations

from llamaclust.cluster.front.errors import HttpError
from llamaclust.cluster.front.settings import ApiSettings
from llamaclust.cluster.scheduler.validation import check_adapters
from llamaclust.core.errors import ParameterError
from llamaclust.core.limits import AdapterScales


class ModelNames:
    """Which models requests may name."""

    def __init__(self, served: str, settings: ApiSettings, *, any_by_default: bool = False) -> None:
        """`any_by_default`: unless the settings say otherwise, a request may name any model."""
        self._served = served
        self._names = {served, *settings.aliases}
        self._adapters = settings.adapters
        self._takes_any = any_by_default if settings.strict_model is None else not settings.strict_model

    def adapters(
        self, name: str | None, lora: AdapterScales | None = None, default: AdapterScales = ()
    ) -> AdapterScales:
        """What a request for a model is computed with: an adapter that it names as the model, those of its field
        `lora`, or `default`. HttpError 404 for another model's name; ParameterError for both of the former, and for an
        adapter that is none."""
        if (number := self._adapters.number_of(name)) is not None:
            if lora is not None:
                raise ParameterError("lora", f"model names the adapter {name!r} already: leave one of them out")
            scale = self._adapters[number].scale
            return ((number, scale),) if scale else ()
        self.check(name)
        if lora is None:
            return default
        check_adapters(lora, self._adapters.numbers)
        return tuple((adapter, scale) for adapter, scale in lora if scale)

    def shown(self, name: str | None) -> str:
        """The name of the model in replies."""
        return name if name is not None and name in self._adapters.names else self._served

    def check(self, name: str | None) -> None:
        """Another model's name is refused, lest its answers seem to be this model's, and an adapter's where none is
        taken. HttpError."""
        if name in self._adapters.names:
            message = f"model: {name!r} is an adapter; here only {self._served!r} itself is computed with"
            raise HttpError(400, "unsupported_parameter", message, param="model")
        if name is not None and name not in self._names and not self._takes_any:
            served = ", ".join(map(repr, (self._served, *self._adapters.names)))
            message = f"model: {name[:200]!r} is not served here, only {served}"
            raise HttpError(404, "model_not_found", message, param="model")
