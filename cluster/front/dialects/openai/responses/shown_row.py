"""A token's logprobs as responses show them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from llamaclust.cluster.front.fields.logprobs import row_entry
from llamaclust.cluster.front.json_values import DeferredValue
from llamaclust.core.sampling import RowResult
from llamaclust.model.tokenizers.tokenizer import Tokenizer

_FIELDS: Final = ("token", "logprob", "bytes")
_ROW_BYTES, _TOP_BYTES = 400, 8


@dataclass(frozen=True, slots=True)
class ShownRow(DeferredValue):
    """Rendered without the ids that other APIs show."""

    tokenizer: Tokenizer
    row: RowResult

    @property
    def token_bytes(self) -> bytes:
        """The token's text."""
        return self.tokenizer.token_bytes(self.row.token)

    @property
    def entries(self) -> int:
        """See `DeferredValue`."""
        return 1 + len(self.row.top_logprobs)

    @property
    def held_bytes(self) -> int:
        """See `DeferredValue`."""
        return _ROW_BYTES + _TOP_BYTES * len(self.row.top_logprobs)

    def made(self) -> dict[str, Any]:
        """See `DeferredValue`."""
        entry = row_entry(self.tokenizer, self.row)
        return {**_fields(entry), "top_logprobs": [_fields(top) for top in entry["top_logprobs"]]}


def _fields(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: entry[name] for name in _FIELDS}
