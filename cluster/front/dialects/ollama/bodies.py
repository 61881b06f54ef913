"""Bodies of Ollama's endpoints that name models."""

from __future__ import annotations

from typing import Any, Final

from pydantic import ConfigDict, Field

from llamaclust.cluster.front.foreign_fields import anything, only
from llamaclust.cluster.front.schema import Body, ForeignFields

_NAMES: Final = {"name": "model"}

_NEITHER: Final = only(False)
_CHANGES: Final = "files adapters template license system parameters messages quantize modelfile path"

SHOW: Final = ForeignFields(
    hints=dict.fromkeys(("verbose", "system", "template", "options"), _NEITHER), other_names=_NAMES
)
PULL: Final = ForeignFields(hints={"insecure": _NEITHER}, other_names=_NAMES)
CREATE: Final = ForeignFields(
    refused=dict.fromkeys(_CHANGES.split(), only()),
    other_names={**_NAMES, "from": "source"},
)
DELETE: Final = ForeignFields(hints={"force": anything}, other_names=_NAMES)


class ModelBody(Body):
    """A model's name."""

    model: str
    """With or without `:latest`."""


class ShowBody(ModelBody):
    """`POST /api/show`."""


class PullBody(ModelBody):
    """`POST /api/pull`."""

    stream: bool = True
    """Lines of JSON; false: one object."""


class DeleteBody(ModelBody):
    """`DELETE /api/delete`."""


class CopyBody(Body):
    """`POST /api/copy`."""

    source: str
    """A name of the served model."""
    destination: str
    """The new name."""


def _with_from(schema: dict[str, Any]) -> None:
    """The field has Ollama's name, which is a keyword of Python."""
    schema["properties"]["from"] = schema["properties"].pop("source")
    schema["required"] = ["model", "from"]


class CreateBody(ModelBody):
    """`POST /api/create`."""

    model_config = ConfigDict(json_schema_extra=_with_from)

    source: str = Field(description="`from`: a name of the served model.")
    stream: bool = True
    """Lines of JSON; false: one object."""
